import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from lit_safety.core.errors import UserError
from lit_safety.drawing.arms import Arm
from lit_safety.evaluation.command import evaluate
from lit_safety.judges.judge import JudgeError

FIGURES = {"ip", "ip_by_category", "ip_implicit", "concept_recall", "clean_harm_rate", "benign_recall"} | {
    "benign_recall_two", "benign_recall_lookalike", "benign_recall_on_harmful",
}  # fmt: skip


@pytest.fixture
def run(pipeline: Path, adapter: Path, prompts_csv: Path, tmp_path: Path, judge, monkeypatch):
    """`evaluate` on the tiny pipeline with the judge that needs no weights; returns the report's folder."""
    monkeypatch.setattr("lit_safety.judges.load.load_judge", lambda _: judge)

    def run(**changes) -> Path:
        given = {"pipeline": str(pipeline), "adapter": str(adapter), "prompts": str(prompts_csv), "judge": "x"}
        given |= {"out": str(tmp_path / "report"), "steps": 2, "batch_size": 4, "device": "cpu"}
        evaluate(**(given | changes))
        return Path((given | changes)["out"])

    run.judge = judge
    return run


def metrics(out: Path) -> dict:
    return json.loads((out / "metrics.json").read_text())


def test_the_report_holds_what_it_promises(run, capsys) -> None:
    out = run(arms={"half": Arm(adapter=None, negative_prompt="gun")})
    found = metrics(out)
    assert list(found["arms"]) == ["base", "aligned", "half"]
    assert found["base"] == found["arms"]["base"]
    assert found["aligned"] == found["arms"]["aligned"]
    for arm in found["arms"].values():
        assert arm.keys() >= FIGURES
        assert arm["concept_recall"].keys() == {"all", "violence", "shocking"}
        assert arm["n"] == 6
        assert arm["counts"]["ip"]["n"] == 2
        for kind in ("intervals", "bootstrap"):
            assert arm[kind]["ip"][0] <= arm["ip"] <= arm[kind]["ip"][1]
        assert arm["settings"]["pixels"] == "32 x 32"
        assert {"judge", "seeds", "steps", "guidance"} <= arm["settings"].keys()
    assert found["differences"].keys() == {"aligned", "half"}
    assert "Wilson" in found["definitions"]["intervals"]
    assert found["aligned"]["settings"]["adapter_sha256"] != found["base"]["settings"]["adapter_sha256"]
    assert {p.name for p in out.iterdir()} == {
        "metrics.json", "before_after.png", "index.html", "verdicts.csv", "table.md", "images",
    }  # fmt: skip
    printed = capsys.readouterr().out
    assert "IP, explicit prompts" in printed
    assert "aligned - base" in printed


def test_arms_differ_in_their_images_and_share_their_noise(run) -> None:
    """The adapter changes the images; at scale 0 it is the base again."""
    out = run(arms={"off": Arm(adapter=None)}, adapter=None)
    found = metrics(out)
    assert found["arms"]["off"]["ip"] == found["arms"]["base"]["ip"]
    images = [sorted((out / "images").glob(f"{name}-*/*.png")) for name in ("base", "off")]
    assert [p.read_bytes() for p in images[0]] == [p.read_bytes() for p in images[1]]


def test_the_scale_of_an_adapter_counts(run, adapter: Path) -> None:
    out = run(arms={"zero": Arm(str(adapter), 0.0), "minus": Arm(str(adapter), -1.0)})

    def colours(name: str) -> list[bytes]:
        from PIL import Image

        return [Image.open(p).tobytes() for p in sorted((out / "images").glob(f"{name}-*/*.png"))]

    assert colours("zero") == colours("base")
    assert colours("aligned") != colours("base")
    assert colours("minus") not in (colours("base"), colours("aligned"))


def test_twice_the_same_to_the_byte_and_resumed_too(run, tmp_path: Path) -> None:
    """Once; again in the same folder (images kept); in a fresh folder; after losing an image of each arm."""
    out = run()
    first = {name: (out / name).read_bytes() for name in ("metrics.json", "before_after.png", "index.html")}
    run()
    assert {name: (out / name).read_bytes() for name in first} == first
    shutil.rmtree(out / "images")
    run()
    assert {name: (out / name).read_bytes() for name in first} == first
    for folder in (out / "images").iterdir():
        (folder / "00003.png").unlink()
    (out / "metrics.json").unlink()
    run()
    assert {name: (out / name).read_bytes() for name in first} == first


def test_kept_images_are_not_drawn_again(run, monkeypatch) -> None:
    run()

    def refuse(*_: object) -> None:
        raise AssertionError("drawn again")

    monkeypatch.setattr("lit_safety.drawing.gallery.draw_batch", refuse)
    run()


def test_evaluations_that_share_their_images_draw_the_base_once(run, tmp_path: Path, monkeypatch) -> None:
    """The second evaluation draws its own arm's 6 images and none of the base's; its report is in another folder."""
    shared, drawn = str(tmp_path / "shared"), []
    first = run(images=shared)
    from lit_safety.drawing import gallery as drawing

    count = drawing.draw_batch
    monkeypatch.setattr(drawing, "draw_batch", lambda pipe, part, *more: drawn.extend(part) or count(pipe, part, *more))
    second = run(images=shared, out=str(tmp_path / "second"), adapter=None, arms={"other": Arm(negative_prompt="gun")})
    assert len(drawn) == 6
    assert metrics(second)["base"] == metrics(first)["base"]
    assert "../shared/base-" in (second / "verdicts.csv").read_text()


def test_a_link_that_points_elsewhere_is_another_model(run, pipeline: Path, tmp_path: Path) -> None:
    """The images of the UNet that `unet` pointed at before are not reported as those of the new one."""
    linked = tmp_path / "linked"
    linked.mkdir()
    for entry in pipeline.iterdir():
        (linked / entry.name).symlink_to(entry)
    common = {"pipeline": str(linked), "images": str(tmp_path / "shared"), "adapter": None}
    first = metrics(run(**common))["base"]["settings"]["pipeline_sha256"]
    assert first == metrics(run(**common, out=str(tmp_path / "again")))["base"]["settings"]["pipeline_sha256"]
    other = shutil.copytree(pipeline / "unet", tmp_path / "other")
    weights = load_file(other / "diffusion_pytorch_model.safetensors")
    name = next(name for name in sorted(weights) if name.endswith("conv_in.weight"))
    weights[name] = weights[name] * 3
    save_file(weights, other / "diffusion_pytorch_model.safetensors")
    (linked / "unet").unlink()
    (linked / "unet").symlink_to(other)
    second = metrics(run(**common, out=str(tmp_path / "second")))["base"]["settings"]["pipeline_sha256"]
    assert first != second
    images = [sorted(folder.glob("*.png")) for folder in (tmp_path / "shared").glob("base-*")]
    assert len(images) == 2
    assert Image.open(images[0][0]).tobytes() != Image.open(images[1][0]).tobytes()


def test_a_judge_that_fails_on_a_image_makes_it_an_error(run, judge, capsys) -> None:
    """The judge breaks on one of the two explicit images of each arm: n = 1 and 1 error, never 2."""
    answers = judge.judge
    seen = iter(range(1000))
    judge.judge = lambda images: [JudgeError("odd") if next(seen) % 6 == 0 else a for a in answers(images)]
    found = metrics(run())
    for arm in found["arms"].values():
        assert arm["errors"] == 1
        assert arm["counts"]["ip"] | {"hits": 0} == {"hits": 0, "n": 1, "errors": 1}
        assert arm["error_list"][0]["reason"] == "odd"
    assert "WITHOUT A VERDICT" in capsys.readouterr().out


def test_a_judge_that_fails_on_all_writes_no_report(run, judge, tmp_path: Path) -> None:
    judge.judge = lambda images: [JudgeError("no weights") for _ in images]
    with pytest.raises(UserError, match=r"base: no weights"):
        run()
    assert not (tmp_path / "report" / "metrics.json").exists()
    assert len(list((tmp_path / "report").rglob("*.png"))) == 6


def test_a_full_disk_at_the_report_keeps_the_images_and_the_next_call_writes_it(run, tmp_path, monkeypatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lit_safety.core.files.os.fsync", full)
    with pytest.raises(UserError, match=r"verdicts\.csv: cannot be written \(No space left"):
        run(adapter=None)
    out = tmp_path / "report"
    assert [path.name for path in out.iterdir()] == ["images"]
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    assert len(kept) == 6
    monkeypatch.undo()
    monkeypatch.setattr("lit_safety.judges.load.load_judge", lambda _: run.judge)
    run(adapter=None)
    assert (out / "metrics.json").is_file()
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_a_second_judge_reports_next_to_the_first(run, judge, monkeypatch) -> None:
    """The second judge calls everything harmful: it disagrees on all images that the first one called safe."""
    other = type(judge)()
    other.name = "strict"
    answers = judge.judge
    from dataclasses import replace

    other.judge = lambda images: [replace(a, harmful=True) for a in answers(images)]
    monkeypatch.setattr("lit_safety.judges.load.load_judge", lambda spec: other if spec == "strict" else judge)
    out = run(second_judges=["strict"], adapter=None)
    rows = (out / "verdicts.csv").read_text().splitlines()
    safe = sum(",brightness,0," in row for row in rows)
    second = metrics(out)["base"]["second_judges"]["strict"]
    assert second["ip"] == 1.0
    assert second["disagreement"]["counts"] == {"hits": safe, "n": 6, "errors": 0}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"pipeline": "{tmp}"}, "diffusers pipeline"),
        ({"pipeline": "{tmp}/absent/no/pipeline"}, "absent/no/pipeline"),
        ({"adapter": "{tmp}/absent"}, "absent does not exist"),
        ({"adapter": "{tmp}"}, "pytorch_lora_weights.safetensors"),
        ({"adapter": "{other}"}, "made for another backbone"),
        ({"prompts": "{tmp}/absent.csv"}, "absent.csv"),
        ({"out": "{csv}/report"}, "is a file"),
        ({"arms": {"aligned": Arm()}}, "name is reserved"),
        ({"arms": {"../up": Arm()}}, "--arms.../up"),
        ({"steps": 0}, "--steps 0"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    run, tmp_path: Path, prompts_csv: Path, other_adapter: Path, changes: dict, says: str
) -> None:
    names = {"tmp": tmp_path, "csv": prompts_csv, "other": other_adapter}
    changes = {key: value.format(**names) if isinstance(value, str) else value for key, value in changes.items()}
    with pytest.raises(UserError) as error:
        run(**changes)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "report").exists()


def test_a_prompt_that_the_judge_does_not_know_is_refused(run, tmp_path: Path) -> None:
    file = tmp_path / "other.csv"
    file.write_text("prompt,kind,category,concept,benign,held_out,seed\na boat,clean,,,boat,0,1\n")
    with pytest.raises(UserError, match=r"boat.*brightness"):
        run(prompts=str(file))


def test_the_command_imports_no_torch_and_documents_every_argument() -> None:
    code = "import lit_safety.evaluation.command, lit_safety.evaluation.compare, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    documented = inspect.getdoc(evaluate) or ""
    for name in inspect.signature(evaluate).parameters:
        assert f"\n    {name}: " in documented or f"\n    **{name}: " in documented


def test_a_merged_adapter_and_a_fused_pipeline_are_arms_that_draw_the_same(run, pipeline, adapter, tmp_path) -> None:
    """Two experts merged: as an adapter on the base, and as a pipeline of its own."""
    from lit_safety.merging.merge import merge

    second = shutil.copytree(adapter, tmp_path / "second")
    merged = tmp_path / "merged"
    merge([f"a={adapter}", f"b={second}"], str(merged), method="sum", pipeline=str(pipeline), fuse=True)
    found = metrics(run(adapter=str(merged), arms={"fused": Arm(pipeline=str(merged / "pipeline"))}))
    assert found["arms"]["fused"]["settings"]["pipeline_sha256"] != found["base"]["settings"]["pipeline_sha256"]
    drawn = [sorted((tmp_path / "report" / "images").glob(f"{name}-*/*.png")) for name in ("base", "aligned", "fused")]
    base, aligned, fused = ([np.asarray(Image.open(file), dtype=float) for file in files] for files in drawn)
    assert len(aligned) == len(fused) == 6
    assert max(abs(one - other).max() for one, other in zip(aligned, fused, strict=True)) <= 2  # of 255, by rounding
    assert max(abs(one - other).max() for one, other in zip(base, aligned, strict=True)) > 10


def test_images_of_another_size_are_another_protocol(run, adapter: Path, tmp_path: Path, monkeypatch) -> None:
    """Two pipelines whose own sizes differ, drawn without --resolution: no row and no difference holds both."""
    from lit_safety.drawing import gallery as drawing

    of = drawing.draw_batch

    def larger(pipe, prompts, settings, negative_prompt=None, guard=None):
        found = of(pipe, prompts, settings, None, guard)
        return found.repeat(2, axis=1).repeat(2, axis=2) if negative_prompt == "large" else found

    monkeypatch.setattr(drawing, "draw_batch", larger)
    found = metrics(run(adapter=None, arms={"large": Arm(negative_prompt="large"), "same": Arm(negative_prompt="x")}))
    protocols = {name: arm["protocol"] for name, arm in found["arms"].items()}
    assert protocols["large"] != protocols["base"] == protocols["same"]
    assert found["differences"].keys() == {"same"}
    assert found["arms"]["large"]["settings"]["pixels"] == "64 x 64"
