import json
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from jsonargparse import CLI
from safetensors.torch import load_file, save_file

from lit_safety.adapters.lora_file import read_lora, write_lora
from lit_safety.adapters.low_rank import LowRank
from lit_safety.core.errors import UserError
from lit_safety.merging.merge import merge
from lit_safety.merging.options import CalibrationOptions, TuningOptions


@pytest.fixture
def experts(tmp_path: Path, save_expert: Callable[..., Path]) -> list[str]:
    """Two experts of different rank and alpha."""
    folders = (tmp_path / "hate" / "adapter", tmp_path / "violence" / "adapter")
    return [str(save_expert(folders[0], 1)), str(save_expert(folders[1], 2, rank=3, alpha=1.0))]


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    file = tmp_path / "prompts.csv"
    file.write_text("prompt,category\na gun,violence\na red cat with a gun,hate\n")
    return str(file)


def predict(pipe: StableDiffusionPipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    noisy, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 7, 32, generator=generator)
    with torch.no_grad():
        return pipe.unet(noisy, torch.tensor([100, 700]), text).sample


def with_deltas(folder: Path, deltas: dict[str, torch.Tensor]) -> StableDiffusionPipeline:
    """The base with whole updates added to its weights by hand."""
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    for name, delta in deltas.items():
        weight = pipe.unet.get_submodule(name.removeprefix("unet.")).weight
        weight.data += delta.reshape(weight.shape).to(weight)
    return pipe


def test_stock_diffusers_draws_with_the_sum_of_the_updates(tiny_pipeline: Path, tmp_path: Path, experts: list[str]):
    one, two = (read_lora(folder) for folder in experts)
    expected = predict(with_deltas(tiny_pipeline, {name: one[name].delta() + 2 * two[name].delta() for name in one}))
    merge(experts, str(tmp_path / "out"), method="sum", weights=[1.0, 2.0], fuse=True)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    assert not torch.allclose(predict(pipe), expected, atol=1e-2)
    pipe.load_lora_weights(tmp_path / "out")
    torch.testing.assert_close(predict(pipe), expected, rtol=1e-5, atol=1e-5)
    fused = StableDiffusionPipeline.from_pretrained(tmp_path / "out" / "pipeline")
    torch.testing.assert_close(predict(fused), expected, rtol=1e-5, atol=1e-5)
    assert not any("lora" in name for name, _ in fused.unet.named_parameters())


def test_a_pipeline_that_is_stored_in_half_precision_only_is_fused_too(
    tiny_pipeline: Path, tmp_path: Path, experts: list[str]
):
    half = tmp_path / "half"
    StableDiffusionPipeline.from_pretrained(tiny_pipeline).to(torch.float16).save_pretrained(half, variant="fp16")
    pipe = StableDiffusionPipeline.from_pretrained(half, variant="fp16", dtype=torch.float32)
    pipe.load_lora_weights(experts[0])
    merge(experts[:1], str(tmp_path / "out"), pipeline=str(half), fuse=True)
    fused = StableDiffusionPipeline.from_pretrained(tmp_path / "out" / "pipeline")
    torch.testing.assert_close(predict(fused), predict(pipe), rtol=1e-5, atol=1e-5)


def test_one_expert_comes_out_as_it_went_in(tmp_path: Path, experts: list[str]):
    """By the default method, which needs no prompts when there is nothing to compare."""
    merge(experts[1:], str(tmp_path / "out"))
    before, after = read_lora(experts[1]), read_lora(tmp_path / "out")
    assert set(after) == set(before)
    for name, layer in after.items():
        assert torch.equal(layer.a, before[name].a)
        assert torch.equal(layer.b, before[name].b)
        assert layer.scale == before[name].scale


def test_comerge_end_to_end(tmp_path: Path, tiny_pipeline: Path, experts: list[str], prompts: str):
    """The pipeline is found by the experts' cards; every row is one expert's; the order of the experts is nothing."""
    options = CalibrationOptions(prompts=prompts, timesteps=1, steps=1)
    for number, order in enumerate((experts, experts[::-1])):
        merge(order, str(tmp_path / str(number)), method="comerge", calibration=options)
    found, again, one, two = (read_lora(p) for p in (tmp_path / "0", tmp_path / "1", *experts))
    report = json.loads((tmp_path / "0" / "report.json").read_text())
    for name, layer in found.items():
        assert torch.equal(layer.a, again[name].a)
        assert torch.equal(layer.b, again[name].b)
        rows = torch.stack([(layer.delta() - 1.06 * 2**0.5 * e[name].delta()).abs().amax(dim=1) for e in (one, two)])
        assert float(rows.min(dim=0).values.max()) < 1e-5
        counted = report["layers"][name]["rows"]
        assert counted == {"hate": int((rows[0] < 1e-5).sum()), "violence": int((rows[1] < 1e-5).sum())}
    assert report["calibration"]["count"] == 2
    assert report["residual"] < 1e-6
    assert report["experts"]["violence"]["ranks"] == [3]
    assert report["megabytes"] == (tmp_path / "0" / "pytorch_lora_weights.safetensors").stat().st_size / 1e6
    assert report["seconds"]["calibration"] > 0 < report["seconds"]["merging"]
    card = (tmp_path / "0" / "README.md").read_text()
    assert f"base_model: {tiny_pipeline}" in card
    assert "Do not negate it" in card
    assert "| violence | 1 | 3 |" in card


@pytest.mark.parametrize("method", ["mean", "svd", "ties", "dare", "tsv_m", "iso_c"])
def test_every_method_writes_a_file_of_the_asked_rank(tmp_path: Path, experts: list[str], method: str):
    CLI(merge, args=[json.dumps(experts), "--out", str(tmp_path / "out"), "--method", method, "--rank", "2"])
    assert {layer.rank for layer in read_lora(tmp_path / "out").values()} == {2}
    assert json.loads((tmp_path / "out" / "report.json").read_text())["residual"] > 0


def test_an_expert_is_added_later(tmp_path: Path, tiny_pipeline: Path, experts: list[str], prompts: str,
                                  save_expert: Callable[..., Path]):  # fmt: skip
    """Merged again with a third one: the files of the two stay what they are, every row is one of the three's, and
    those that the new one did not win stand as before."""
    options = CalibrationOptions(prompts=prompts, timesteps=1, steps=1)
    files = [Path(folder) / "pytorch_lora_weights.safetensors" for folder in experts]
    before = [file.read_bytes() for file in files]
    merge(experts, str(tmp_path / "two"), method="comerge", statistic="magnitude", scale=1.0,
          calibration=options)  # fmt: skip
    new = str(save_expert(tmp_path / "sexual" / "adapter", 3))
    merge([*experts, new], str(tmp_path / "three"), method="comerge", statistic="magnitude", scale=1.0,
          calibration=options)  # fmt: skip
    assert [file.read_bytes() for file in files] == before
    two, three, third = (read_lora(folder) for folder in (tmp_path / "two", tmp_path / "three", new))
    won = 0
    for name, layer in three.items():
        kept = (layer.delta() - two[name].delta()).abs().amax(dim=1) < 1e-5
        taken = (layer.delta() - third[name].delta()).abs().amax(dim=1) < 1e-5
        assert (kept | taken).all()
        won += int(taken.sum())
    assert won > 0
    StableDiffusionPipeline.from_pretrained(tiny_pipeline).load_lora_weights(tmp_path / "three")


def test_missing_options_are_named(tmp_path: Path, experts: list[str], prompts: str):
    out = str(tmp_path / "out")
    for method in ("comerge", "regmean"):
        with pytest.raises(UserError, match=r"--calibration\.prompts .* sum, mean, svd, ties, dare"):
            merge(experts, out, method=method)
    with pytest.raises(UserError, match="1 numbers for 2 experts"):
        merge(experts, out, method="sum", weights=[1.0])
    for device in ("nowhere", "cuda:99"):
        with pytest.raises(UserError, match=f"--device {device}: "):
            merge(experts, out, method="comerge", calibration=CalibrationOptions(prompts=prompts), device=device)
    (Path(experts[0]) / "README.md").write_text("no card")
    (Path(experts[1]) / "README.md").write_text("no card")
    with pytest.raises(UserError, match="give --pipeline"):
        merge(experts, out, calibration=CalibrationOptions(prompts=prompts))
    with pytest.raises(UserError, match="--fuse needs the base model"):
        merge(experts, out, method="mean", fuse=True)
    assert not (tmp_path / "out").exists()


def test_only_an_earlier_merge_is_overwritten(tmp_path: Path, experts: list[str]):
    out = tmp_path / "out"
    merge(experts, str(out), method="mean")
    merge(experts[:1], str(out), method="mean")
    assert list(json.loads((out / "report.json").read_text())["experts"]) == ["adapter"]
    with pytest.raises(UserError, match=r"--out .*hate: contains the expert"):
        merge(experts, str(tmp_path / "hate"), method="mean")
    own = tmp_path / "own"
    own.mkdir()
    (own / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"--out .*own: is not empty"):
        merge(experts, str(own), method="mean")
    assert (own / "thesis.txt").read_text() == "mine"


def test_a_failed_merge_leaves_the_earlier_one(tmp_path: Path, experts: list[str], wide_pipeline: Path):
    out = tmp_path / "out"
    merge(experts, str(out), method="mean")
    before = (out / "report.json").read_text()
    with pytest.raises(UserError, match="made for another backbone"):
        merge(experts, str(out), method="sum", fuse=True, pipeline=str(wide_pipeline))
    assert (out / "report.json").read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_cards_of_different_base_models_are_refused(tmp_path: Path, tiny_pipeline: Path, experts: list[str]):
    """Layers of one size tell nothing: it is the cards that differ. Whoever knows better names the pipeline."""
    card = Path(experts[1]) / "README.md"
    card.write_text(card.read_text().replace(str(tiny_pipeline), "someone/another-base"))
    with pytest.raises(UserError, match=r"different base models .*violence: someone/another-base"):
        merge(experts, str(tmp_path / "out"), method="mean")
    merge(experts, str(tmp_path / "out"), method="mean", pipeline=str(tiny_pipeline))
    assert read_lora(tmp_path / "out")


def rename(folder: str, change: Callable[[str], str]) -> None:
    """An expert with other names and without its settings, as some tools save it."""
    file = Path(folder) / "pytorch_lora_weights.safetensors"
    save_file({change(key): tensor for key, tensor in load_file(file).items()}, file)


def without_card(experts: list[str]) -> None:
    for folder in experts:
        (Path(folder) / "README.md").unlink()


def test_prefixes_of_tools_are_taken_off_so_that_stock_diffusers_loads_the_merged_file(
    tiny_pipeline: Path, tmp_path: Path, experts: list[str]
):
    without_card(experts)
    rename(experts[0], lambda key: key.replace("unet.", "unet.base_model.model."))
    rename(experts[1], lambda key: key.replace(".weight", ".default.weight"))
    one, two = (read_lora(folder) for folder in experts)
    merge(experts, str(tmp_path / "out"), method="sum")
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    pipe.load_lora_weights(tmp_path / "out")
    expected = predict(with_deltas(tiny_pipeline, {name: one[name].delta() + two[name].delta() for name in one}))
    torch.testing.assert_close(predict(pipe), expected, rtol=1e-5, atol=1e-5)


def test_layers_that_no_base_model_has_are_refused_without_it(tmp_path: Path, experts: list[str]):
    without_card(experts)
    rename(experts[0], lambda key: key.replace("mid_block.attentions.0", "mid_block.1"))
    with pytest.raises(UserError, match=rf"{experts[0]}.*unet\.mid_block\.1\.transformer_blocks"):
        merge(experts, str(tmp_path / "out"), method="sum")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("named", ["by the card", "by --pipeline"])
def test_layers_that_the_base_model_does_not_have_are_refused(
    tiny_pipeline: Path, tmp_path: Path, experts: list[str], named: str
):
    """They could belong to another model: only the base model's configuration shows it."""
    rename(experts[0], lambda key: key.replace("down_blocks.1", "down_blocks.3"))
    pipeline = None
    if named == "by --pipeline":
        without_card(experts)
        merge(experts, str(tmp_path / "out"), method="sum")
        pipeline = str(tiny_pipeline)
    with pytest.raises(UserError, match=r"do not exist .*down_blocks\.3"):
        merge(experts, str(tmp_path / "out2"), method="sum", pipeline=pipeline)
    assert not (tmp_path / "out2").exists()


def test_a_layer_of_another_size_than_the_base_models_is_refused(tmp_path: Path, tiny_pipeline: Path):
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    write_lora(tmp_path / "x.safetensors", {f"unet.{layer}": LowRank(torch.ones(2, 48), torch.ones(48, 2))})
    with pytest.raises(UserError, match=rf"{layer} is 48 -> 48"):
        merge([str(tmp_path / "x.safetensors")], str(tmp_path / "out"), pipeline=str(tiny_pipeline), method="sum")


def test_a_full_disk_leaves_no_half_merge(tmp_path: Path, experts: list[str]):
    out = tmp_path / "out"
    merge(experts, str(out), method="mean")
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    limit, action = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limit[1]))  # as a full disk: no file grows beyond it
    try:
        with pytest.raises(UserError, match="cannot be written"):
            merge(experts, str(out), method="sum")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, action)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert not [one.name for one in tmp_path.iterdir() if one.name.startswith(".")]


@pytest.fixture
def kinds(tmp_path: Path) -> str:
    """What regmean looks at and mu is chosen on: four prompts of each category, four clean ones and look-alikes."""
    file = tmp_path / "kinds.csv"
    rows = ["prompt,kind,category,held_out,seed"]
    for n, thing in enumerate(("cat", "house", "red cat", "blue house")):
        rows += [f"a gun and a {thing},explicit,violence,0,{n}", f"a {thing} with a gun,implicit,hate,0,{n}"]
        rows += [f"a {thing},clean,,0,{n}", f"a red {thing},lookalike,,0,{n}"]
    file.write_text("\n".join([*rows, "held out,implicit,hate,1,9"]) + "\n")
    return str(file)


def test_regmean_is_the_default_and_writes_several_mu_from_one_look(
    tmp_path: Path, tiny_pipeline: Path, experts: list[str], kinds: str
):
    options = CalibrationOptions(prompts=kinds, each=2, clean=4, steps=1)
    for number, order in enumerate((experts, experts[::-1])):
        merge(order, str(tmp_path / str(number)), calibration=options, mus=[0.0, 10.0])
    found, again, free, kept = (read_lora(tmp_path / path) for path in ("0", "1", "0/mu-0", "0/mu-10"))
    for name, layer in found.items():
        assert torch.equal(layer.a, again[name].a)
        assert layer.rank == min(7, *layer.shape)
        assert not torch.allclose(free[name].delta(), kept[name].delta(), rtol=1e-2)
    report = json.loads((tmp_path / "0" / "report.json").read_text())
    assert (report["recipe"]["method"], report["recipe"]["mu"]) == ("regmean", 0.3)
    assert report["calibration"]["prompts by expert"] == {"hate": 2, "violence": 2}
    assert report["residual"] < 1e-6
    assert "| mu | 0.3 |" in (tmp_path / "0" / "README.md").read_text()
    assert json.loads((tmp_path / "0" / "mu-10" / "report.json").read_text())["recipe"]["mu"] == 10.0
    StableDiffusionPipeline.from_pretrained(tiny_pipeline).load_lora_weights(tmp_path / "0")


def test_mu_is_chosen_on_prompts_that_were_not_calibrated_on(tmp_path: Path, experts: list[str], kinds: str):
    options = CalibrationOptions(prompts=kinds, each=2, clean=4, steps=1, other_world=True)
    tuning = TuningOptions(mus=[0.0, 1.0], judge="data/toyworld/judge", implicit=4, lookalike=4, clean=4)
    merge(experts, str(tmp_path / "out"), calibration=options, tune=True, tuning=tuning)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    tried = report["tuning"]["tried"]
    assert [one["mu"] for one in tried] == [0.0, 1.0]
    # of 16 prompts 8 were calibrated on
    assert [one["images"] for one in tried] == [8, 8]
    assert report["tuning"]["mu"] == report["recipe"]["mu"] == min(tried, key=lambda one: (
        round(sum(one[key] or 0.0 for key in ("ip", "ip_implicit")), 9), one["fid"], -one["mu"]))["mu"]  # fmt: skip
    assert (tmp_path / "out" / "tuning.png").read_bytes().startswith(b"\x89PNG")


def test_what_the_choice_of_mu_needs_is_named_before_the_model_is_loaded(
    tmp_path: Path, experts: list[str], kinds: str, prompts: str
):
    out, options = str(tmp_path / "out"), CalibrationOptions(prompts=kinds)
    with pytest.raises(UserError, match=r"--tuning\.judge"):
        merge(experts, out, calibration=options, tune=True)
    with pytest.raises(UserError, match=r"--tuning\.prompts .*prompts\.csv: must hold harmful and clean"):
        merge(experts, out, calibration=options, tune=True, tuning=TuningOptions(judge="judge", prompts=prompts))
    for path in ("data/toyworld/prompts/test.csv", "data/toyworld/judge_b"):
        given = {"prompts": path, "judge": "judge"} if path.endswith("csv") else {"judge": path}
        with pytest.raises(UserError, match="this world's reports"):
            merge(experts, out, calibration=options, tune=True, tuning=TuningOptions(**given))
    with pytest.raises(UserError, match="--mus: sum has no mu"):
        merge(experts, out, method="sum", mus=[0.1])
    with pytest.raises(UserError, match="--tune: a single expert"):
        merge(experts[:1], out, tune=True)
    with pytest.raises(UserError, match=r"--calibration\.prompts .*prompts\.csv.*clean or look-alike"):
        merge(experts, out, calibration=CalibrationOptions(prompts=prompts))
    assert not (tmp_path / "out").exists()
