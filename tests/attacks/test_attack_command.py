"""The command `attack` on a tiny pipeline: what it writes, resumption, arms, and what it refuses."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from lit_safety.attacks import AdapterScale, Attack, FineTune, Paraphrases, Sampler, Samplers, Transfer
from lit_safety.attacks.command import attack
from lit_safety.core.errors import UserError
from lit_safety.drawing.arms import Arm
from lit_safety.drawing.guards.safe_latent_diffusion import SafeLatentDiffusion
from lit_safety.judges.judge import JudgeError


def some() -> dict[str, Attack]:
    return {"scale": AdapterScale([0.0]), "samplers": Samplers([Sampler(steps=2)])}


@pytest.fixture
def run(tiny_pipeline: Path, tiny_adapter: Path, prompts_csv: Path, tmp_path: Path, red_judge, monkeypatch):
    """`attack` on base and aligned with the judge that needs no weights; returns the report's content."""
    monkeypatch.setattr("lit_safety.judges.load.load_judge", lambda _: red_judge)

    def run(**changes) -> dict:
        given = {"pipeline": str(tiny_pipeline), "adapter": str(tiny_adapter), "prompts": str(prompts_csv)}
        given |= {"judge": "x", "out": str(tmp_path / "out"), "steps": 1, "batch_size": 4, "device": "cpu"}
        given |= {"attacks": some()}
        attack(**(given | changes))  # type: ignore[arg-type]
        return json.loads((Path((given | changes)["out"]) / "attacks.json").read_text())

    return run


def test_the_report_holds_what_it_promises(run: Callable[..., dict], tmp_path: Path, capsys) -> None:
    found = run(attacks=some() | {"paraphrases": Paraphrases(tries=2)}, arms={"sld": Arm(guard=SafeLatentDiffusion())})
    assert list(found["attacks"]) == ["scale", "samplers", "paraphrases"]
    scale = found["attacks"]["scale"]
    assert [p["budget"] for p in scale["arms"]["aligned"]] == [0.0, 1.0]
    assert scale["not_applicable"].keys() == {"base", "sld"}
    assert scale["budget"] == "scale of the adapter"
    assert scale["knows"].startswith("white box")
    paraphrases = found["attacks"]["paraphrases"]["arms"]
    assert paraphrases.keys() == {"base", "aligned", "sld"}
    for points in paraphrases.values():
        assert [p["budget"] for p in points] == [0, 1, 2]
        assert [p["asr"] for p in points] == sorted(p["asr"] for p in points)  # keeps what worked
        for p in points:
            assert p["n"] + p["errors"] == 2
            assert p["interval"][0] <= p["asr"] <= p["interval"][1]
            assert p["post"]["n"] <= p["n"]
    protocol = found["protocol"]
    assert protocol["attacked"] == 2
    assert {"judge", "prompts_sha256", "steps", "guidance", "seed", "scheduler", "versions"} <= protocol.keys()
    assert protocol["arms"]["aligned"]["adapter_sha256"]
    with Image.open(tmp_path / "out" / "attacks.png") as image:
        assert image.format == "PNG"
    printed = capsys.readouterr().out
    assert "scale does not apply to base: it has no adapter" in printed
    assert "white box: holds the adapter" in printed


def test_a_unet_that_was_published_alone_is_attacked(
    run: Callable[..., dict], tiny_pipeline: Path, tmp_path: Path
) -> None:
    """The attacker of published weights has them: `public_network` is the pipeline with this UNet."""
    import torch
    from safetensors.torch import load_file, save_file

    from lit_safety.attacks.target import Target
    from tests.attacks.conftest import DRAWING

    weights = load_file(tiny_pipeline / "unet" / "diffusion_pytorch_model.safetensors")
    file = tmp_path / "esd.safetensors"
    changed = {name: tensor + 0.5 for name, tensor in weights.items() if ".attn2." in name}
    save_file(changed, file)
    arm = Arm(unet=str(file), unet_partial=True)
    found = run(arms={"esd": arm})
    about = found["protocol"]["arms"]["esd"]
    assert about["unet"] == str(file)
    assert about["unet_tensors"] == {"replaced": len(changed), "of": len(weights)}
    assert len(found["attacks"]["samplers"]["arms"]["esd"]) == 2
    target = Target("esd", arm, tiny_pipeline, tiny_pipeline, [], [], DRAWING, 0, tmp_path)
    for network, own in ((target.public_network(), True), (target.network(), True), (target.base_network(), False)):
        state = network.backbone.denoiser.state_dict()
        assert all(torch.equal(state[name], tensor) is own for name, tensor in changed.items())


def test_at_scale_zero_the_aligned_arm_is_the_base(run: Callable[..., dict], tmp_path: Path) -> None:
    run(attacks=some() | {"scale": AdapterScale([0.0, -1.0])})
    images = tmp_path / "out" / "images"

    def colours(pattern: str) -> list[bytes]:
        return [Image.open(p).tobytes() for p in sorted(images.glob(pattern))]

    assert colours("scale/aligned-0-*/*.png") == colours("unattacked/base-*/*.png") != []
    assert colours("scale/aligned--1-*/*.png") != colours("unattacked/aligned-*/*.png")


def test_twice_the_same_to_the_byte_and_resumed_too(run: Callable[..., dict], tmp_path: Path, monkeypatch) -> None:
    """Once; in another folder, killed in the second attack and called again: the same files, finished parts kept."""
    first = run()
    text = (tmp_path / "out" / "attacks.json").read_bytes()
    image = (tmp_path / "out" / "attacks.png").read_bytes()

    def killed(self, target):
        raise KeyboardInterrupt

    other = str(tmp_path / "killed")
    with monkeypatch.context() as patch:
        patch.setattr(Samplers, "stages", killed)
        with pytest.raises(KeyboardInterrupt):
            run(out=other)
    done = {p.relative_to(other): p.stat().st_mtime_ns for p in Path(other).rglob("done/scale/*.json")}
    assert len(done) == 2
    assert not (Path(other) / "attacks.json").exists()
    assert run(out=other) == first
    assert {p: (Path(other) / p).stat().st_mtime_ns for p in done} == done  # finished parts are not done again
    assert (Path(other) / "attacks.json").read_bytes() == text
    assert (Path(other) / "attacks.png").read_bytes() == image


def test_a_changed_or_damaged_part_is_done_again_and_the_others_are_kept(
    run: Callable[..., dict], tmp_path: Path
) -> None:
    first = run(adapter=None)
    files = sorted((tmp_path / "out" / "done").rglob("*.json"))
    before = [p.stat().st_mtime_ns for p in files]
    run(adapter=None, attacks=some() | {"scale": AdapterScale([0.5])})
    changed = [p.parent.name for p, then in zip(files, before, strict=True) if p.stat().st_mtime_ns != then]
    assert changed == ["scale"]
    (tmp_path / "out" / "done" / "samplers" / "base.json").write_text('{"points": [')
    assert run(adapter=None) == first


def test_unjudged_images_are_errors_and_never_safe(run: Callable[..., dict], red_judge) -> None:
    """The judge fails on the second image of every call."""
    sound = red_judge.judge
    red_judge.judge = lambda images: [JudgeError("blind") if n == 1 else v for n, v in enumerate(sound(images))]
    found = run(adapter=None, attacks={"samplers": Samplers([Sampler(steps=2)])})
    for points in found["attacks"]["samplers"]["arms"].values():
        assert (points[0]["n"], points[0]["errors"]) == (1, 1)
        assert points[0]["interval"][1] - points[0]["interval"][0] > 0.5


def test_a_judge_that_fails_on_everything_stops_the_run(run: Callable[..., dict], red_judge, tmp_path: Path) -> None:
    red_judge.judge = lambda images: [JudgeError("no weights")] * len(images)
    with pytest.raises(UserError, match=r"judge red .*no weights.*run the same command"):
        run()
    assert not (tmp_path / "out" / "attacks.json").exists()


def test_bad_input(run: Callable[..., dict], tmp_path: Path, prompts_csv: Path) -> None:
    with pytest.raises(UserError, match=r"telepathy.*scale, samplers"):
        run(only=["telepathy"])
    with pytest.raises(UserError, match="give at least one attack"):
        run(attacks={})
    with pytest.raises(UserError, match="no explicit prompt is left"):
        run(explicit=0)
    with pytest.raises(UserError, match="attack FineTune: shards"):
        run(attacks={"tune": FineTune(str(tmp_path / "none"))})
    with pytest.raises(UserError, match="the adapter nowhere does not exist"):
        run(adapter="nowhere")
    assert not (tmp_path / "out" / "done").exists()


def test_an_attack_that_is_no_folder_name_is_refused(run: Callable[..., dict]) -> None:
    with pytest.raises(UserError, match=r"--attacks: `\.\./x`"):
        run(attacks={"../x": AdapterScale([0.0])})


def test_lists_of_attacks_and_other_shards(run: Callable[..., dict], category_shards: Path, pair_shards: Path) -> None:
    attacks = some() | {"tune": FineTune(str(pair_shards), [1], pictures=1, batch_size=1)}
    found = run(attacks=attacks, sets={"few": ["tune"], "unused": ["none"]}, only=["few", "scale"],
                shards=str(category_shards))  # fmt: skip
    assert list(found["attacks"]) == ["scale", "tune"]
    assert found["attacks"]["tune"]["settings"]["shards"] == str(category_shards)
    with pytest.raises(UserError, match="--only: there is no attack none"):
        run(sets={"few": ["none"]}, only=["few"])


def test_transfer_names_an_arm_of_the_run(run: Callable[..., dict]) -> None:
    attacks: dict[str, Attack] = {"moved": Transfer(Samplers([Sampler(steps=2)]), "aligned")}
    found = run(attacks=attacks)["attacks"]["moved"]
    assert found["arms"].keys() == {"base"}
    assert found["not_applicable"].keys() == {"aligned"}
    assert "found on aligned" in found["knows"]
    with pytest.raises(UserError, match="there is no arm nobody"):
        run(attacks={"moved": Transfer(Samplers([Sampler(steps=2)]), "nobody")})


def test_several_processes_find_the_same(run: Callable[..., dict], tmp_path: Path, category_shards: Path, monkeypatch):
    """Each process loads the judge again, so this judge is the toy world's."""
    from lit_safety.judges.load import load_judge
    from tests.helpers.documents import TOYWORLD

    monkeypatch.undo()
    attacks = some() | {"tune": FineTune(str(category_shards), [1], pictures=2, batch_size=2)}
    given = {"judge": str(TOYWORLD / "judge"), "other_world": True, "attacks": attacks}
    assert load_judge(given["judge"]).name
    run(**given, out=str(tmp_path / "one"))
    run(**given, out=str(tmp_path / "two"), processes=2)
    assert (tmp_path / "one" / "attacks.json").read_bytes() == (tmp_path / "two" / "attacks.json").read_bytes()
    assert not [one for one in multiprocessing.active_children() if one.name.startswith("attack")]


def test_an_error_of_a_process_is_one_line_and_what_was_finished_stays(run: Callable[..., dict], tmp_path: Path):
    from tests.helpers.documents import TOYWORLD

    attacks = some() | {"bad": Failing()}
    with pytest.raises(UserError, match="it fails on"):
        run(judge=str(TOYWORLD / "judge"), other_world=True, attacks=attacks, processes=2)
    assert not (tmp_path / "out" / "attacks.json").exists()
    assert not [one for one in multiprocessing.active_children() if one.name.startswith("attack")]


class Failing(Samplers):
    """Fails when it is its turn."""

    def __init__(self) -> None:
        super().__init__([Sampler(steps=2)])

    def stages(self, target):
        raise UserError(f"it fails on {target.name}")
