"""An expert is added to a merge from kept statistics alone, and the outcome is the merge of all at once to the bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lit_safety.adapters.lora_file import write_lora
from lit_safety.adapters.low_rank import LowRank
from lit_safety.core.errors import UserError
from lit_safety.merging.kept import Keeper, KeptExpert, Used, read_kept
from lit_safety.merging.merge import merge
from lit_safety.merging.options import CalibrationOptions

OTHERS = ("hate", "violence")


@pytest.fixture
def prompts(tmp_path: Path) -> Callable[..., str]:
    """A prompt file with the harmful prompts of some categories, and clean ones."""

    def write(*categories: str, clean: bool = True) -> str:
        file = tmp_path / f"{'-'.join(categories)}-{clean}.csv"
        rows = ["prompt,kind,category"]
        for thing in ("cat", "house", "red cat"):
            rows += [f"a gun and a {thing} {category},explicit,{category}" for category in categories]
            rows += [f"a {thing},clean,"] if clean else []
        file.write_text("\n".join(rows) + "\n")
        return str(file)

    return write


@pytest.fixture
def experts(tmp_path: Path, save_expert: Callable[..., Path]) -> dict[str, str]:
    """hate and violence, and a third one that somebody else wrote: kohya's names, other layers, another rank."""
    found = {name: str(save_expert(tmp_path / name, seed)) for seed, name in enumerate(OTHERS)}
    foreign = tmp_path / "foreign.safetensors"
    torch.manual_seed(3)
    block = "lora_unet_mid_block_attentions_0_transformer_blocks_0"
    sizes = {f"{block}_attn1_to_q": (64, 64), f"{block}_ff_net_2": (64, 256)}
    tensors = {}
    for name, (out, inputs) in sizes.items():
        tensors |= {
            f"{name}.lora_down.weight": 0.1 * torch.randn(2, inputs),
            f"{name}.lora_up.weight": 0.1 * torch.randn(out, 2),
            f"{name}.alpha": torch.tensor(1.0),
        }
    save_file(tensors, foreign)
    return {**found, "sexual": f"sexual={foreign}"}


def adapter(folder: Path) -> tuple[dict[str, bytes], dict[str, object]]:
    """The bytes of every tensor and the metadata; the order in which safetensors writes the latter is random."""
    file = folder / "pytorch_lora_weights.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = {name: json.loads(text) if text[:1] == "{" else text for name, text in opened.metadata().items()}
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(file).items()}, metadata


def test_added_later_is_merged_at_once(
    tmp_path: Path, tiny_pipeline: Path, experts: dict[str, str], prompts: Callable[..., str]
):
    """The two experts and their prompts are gone when the third one comes; another layer than theirs is in it."""
    how = {"each": 2, "clean": 2, "steps": 2, "batch_size": 2, "guidance": 2.0}
    whole, two, three = (tmp_path / name for name in ("whole", "two", "three"))
    pipeline = str(tiny_pipeline)
    every = CalibrationOptions(prompts=prompts(*OTHERS, "sexual"), **how)
    merge(list(experts.values()), str(whole), pipeline, calibration=every, weights=[1.0, 2.0, 0.5])
    merge([experts[name] for name in OTHERS], str(two), pipeline, weights=[1.0, 2.0], keep_statistics=True,
          calibration=CalibrationOptions(prompts=prompts(*OTHERS), **how))  # fmt: skip
    assert not (whole / "statistics").exists()
    for name in OTHERS:
        shutil.rmtree(experts[name])
    (tmp_path / "hate-violence-True.csv").unlink()
    new = CalibrationOptions(prompts=prompts("sexual", clean=False), clean=2)
    merge([experts["sexual"]], str(three), pipeline, calibration=new, weights=[0.5], add_to=str(two))
    assert adapter(three) == adapter(whole)
    assert adapter(three) != adapter(two)
    report = json.loads((three / "report.json").read_text())
    assert report["recipe"]["weights"] == {"hate": 1.0, "sexual": 0.5, "violence": 2.0}
    assert report["calibration"]["prompts by expert"] == {"sexual": 2}
    assert report["calibration"]["guidance"] == 2.0
    text = (three / "statistics" / "statistics.json").read_text()
    assert "a gun" not in text  # hashes only
    assert "a cat" in text or "a house" in text
    # a merge of one expert is a beginning too, and the same folder may be written again
    one = tmp_path / "one"
    merge([experts["sexual"]], str(one), pipeline, keep_statistics=True,
          calibration=CalibrationOptions(prompts=prompts("sexual"), **how))  # fmt: skip
    merge([f"style={tmp_path / 'foreign.safetensors'}"], str(one), pipeline, add_to=str(one),
          calibration=CalibrationOptions(prompts=prompts("sexual"), of={"style": prompts("hate")}))  # fmt: skip
    assert [one.expert.name for one in read_kept(one).experts] == ["sexual", "style"]


@pytest.fixture
def kept(tmp_path: Path, make_expert: Callable) -> Path:
    """A folder of statistics of one expert, made by hand."""
    expert = make_expert("hate", 1)
    keeper = Keeper(tmp_path / "merge" / "statistics")
    keeper.finish([KeptExpert(expert, 2.0, "hate", ["00"])], ["a cat"], CalibrationOptions(), {"unet": "ab"})
    return tmp_path / "merge"


def test_factors_come_back_to_the_bit(kept: Path, make_expert: Callable):
    found = read_kept(kept).experts[0]
    assert (found.weight, found.category, found.prompts) == (2.0, "hate", ["00"])
    for name, part in make_expert("hate", 1).layers.items():
        assert torch.equal(found.expert.layers[name].a, part.a)
        assert torch.equal(found.expert.layers[name].b, part.b)
        assert found.expert.layers[name].scale == part.scale


def test_what_does_not_fit_is_named(tmp_path: Path, kept: Path, tiny_pipeline: Path):
    with pytest.raises(UserError, match="keeps no statistics"):
        read_kept(tmp_path)
    found = read_kept(kept)
    with pytest.raises(UserError, match=r"another base model \(unet differ\)"):
        found.check_base({"unet": "cd"})
    with pytest.raises(UserError, match=r"--calibration\.steps 7: .* measured with 20"):
        found.options(CalibrationOptions(steps=7))
    assert found.options(CalibrationOptions(prompts="x", memory=2.0)) == CalibrationOptions(prompts="x", memory=2.0)
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    lora = write_lora(tmp_path / "hate.safetensors", {layer: LowRank(torch.ones(1, 5), torch.ones(5, 1))})
    with pytest.raises(UserError, match=r"--add_to .*expert hate"):
        merge([str(lora)], str(tmp_path / "out"), add_to=str(kept), pipeline="nowhere")
    with pytest.raises(UserError, match="--add_to: sum keeps no statistics"):
        merge([str(lora)], str(tmp_path / "out"), add_to=str(kept), pipeline="nowhere", method="sum")


def test_a_file_that_was_changed_or_lost_is_refused(kept: Path):
    file = next((kept / "statistics").glob("factors-*.safetensors"))
    tensors = load_file(file)
    save_file({key: tensor + 1 for key, tensor in tensors.items()}, file)
    with pytest.raises(UserError, match=f"{file.name}: is not the file that was written"):
        read_kept(kept)
    file.unlink()
    with pytest.raises(UserError, match=f"{file.name}: is missing"):
        read_kept(kept)
    index = kept / "statistics" / "statistics.json"
    index.write_text(index.read_text().replace(file.name, "../x.safetensors"))
    with pytest.raises(UserError, match="files outside of its folder"):
        read_kept(kept)
    index.write_text("[")
    with pytest.raises(UserError, match=r"statistics\.json"):
        read_kept(kept)


def test_prompts_are_known_by_their_hashes():
    used = Used(["a cat"], Used(["a gun"]))
    assert "a cat" in used
    assert "a gun" in used
    assert "a dog" not in used
