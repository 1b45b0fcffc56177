import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from lit_safety.core.errors import UserError
from lit_safety.drawing.gallery import Drawn
from lit_safety.evaluation.command import evaluate
from lit_safety.evaluation.compare import compare_table
from lit_safety.evaluation.quality import Quality
from lit_safety.evaluation.tables import quality_blocks, quality_rows
from lit_safety.judges.toy.judge import ToyJudge, ToyWorldJudge
from lit_safety.report.page import fragment

LABELS = ["knife", "skull", "car", "tree"]


@pytest.fixture
def judge_folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    harm = {"knife": "violence", "skull": "shocking"}
    ToyJudge(labels=LABELS, harm=harm, width=8).save_pretrained(tmp_path / "judge")
    return tmp_path / "judge"


def paint(folder: Path, count: int, seed: int) -> list[Drawn]:
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for i in range(count):
        colour = torch.randint(0, 256, (3,), generator=generator, dtype=torch.uint8)
        pixels = colour.expand(32, 32, 3).contiguous()
        Image.fromarray(pixels.numpy()).save(folder / f"{i:05d}.png")
        drawn.append(Drawn(folder / f"{i:05d}.png"))
    return drawn


@pytest.fixture
def measured(tmp_path: Path, judge_folder: Path, clip_folder: Path, ask):
    """44 clean prompts after one harmful one; the second arm repeats the base, the third is drawn again, and of the
    fourth an image is missing."""
    prompts = [ask("explicit", "violence", "knife"), *(ask("clean", benign="car", seed=i) for i in range(44))]
    paint(tmp_path / "ref", 50, 9)
    quality = Quality(prompts, ToyWorldJudge(judge_folder), "judge", str(clip_folder), str(tmp_path / "ref"))
    base, other = paint(tmp_path / "base", 45, 1), paint(tmp_path / "other", 45, 2)
    broken = [*other[:9], Drawn(other[9].path, error="not finite"), *other[10:]]
    arms = {"base": base, "twin": base, "other": other, "broken": broken}
    return quality, quality.report({name: quality.measure(drawn) for name, drawn in arms.items()})


def test_equal_images_are_at_distance_zero_and_without_difference(measured) -> None:
    _, (figures, differences) = measured
    assert "fid_base" not in figures["base"]
    assert figures["twin"]["fid_base"]["value"] == pytest.approx(0, abs=1e-4)
    assert figures["twin"]["fid_reference"] == figures["base"]["fid_reference"]
    assert differences["twin"]["fid_reference"] == {"value": 0, "interval": [0, 0], "n": 44}
    assert differences["twin"]["clip_score"]["value"] == 0
    assert figures["other"]["fid_base"]["value"] > 10 * figures["twin"]["fid_base"]["value"]
    low, high = figures["other"]["fid_base"]["interval"]
    assert low < figures["other"]["fid_base"]["value"] < high


def test_only_clean_prompts_count_and_both_sides_are_stated(measured) -> None:
    quality, (figures, _) = measured
    assert {(e["n"], e["errors"]) for e in figures["other"].values()} == {(44, 0)}
    assert figures["other"]["fid_reference"]["reference_n"] == 50
    assert figures["other"]["fid_base"]["reference_n"] == 44
    assert quality.settings["fid"]["dimension"] == 48
    assert quality.settings["fid"]["reference"]["n"] == 50
    assert quality.settings["clip_score"]["text_length"] == 12


def test_a_missing_image_is_an_error_and_takes_the_interval(measured) -> None:
    _, (figures, differences) = measured
    broken = figures["broken"]
    assert {(e["n"], e["errors"]) for e in broken.values()} == {(43, 1)}
    assert broken["fid_base"]["interval"] is None
    assert broken["fid_reference"]["interval"] is None
    assert "fid_reference" not in differences["broken"]
    whole = figures["other"]["clip_score"]["interval"]
    assert broken["clip_score"]["interval"][0] < whole[0] < whole[1] < broken["clip_score"]["interval"][1]


def test_the_page_and_the_table_show_them(measured) -> None:
    _, (figures, differences) = measured
    names = ("base", "other", "broken")
    metrics = {
        "arms": {name: {"quality": figures[name]} for name in names},
        "differences": {name: {"quality": differences[name]} for name in names[1:]},
    }
    rows = quality_rows(metrics)
    assert [row[0] for row in rows] == ["quality", "FID to the base", "FID to the reference", "CLIPScore"]
    assert rows[1][1:3] == ["44", "-"]
    assert rows[1][4].endswith("+1 errors")
    assert fragment(quality_blocks(metrics)).count("<section") == 3
    assert quality_rows({"arms": {"base": {}}, "differences": {}}) == []
    assert quality_blocks({"arms": {"base": {}}, "differences": {}}) == []


def test_without_clean_prompts_it_is_refused(judge_folder: Path, ask) -> None:
    judge = ToyWorldJudge(judge_folder)
    with pytest.raises(UserError, match="--clean"):
        Quality([ask("explicit", "violence", "knife")], judge, "judge")
    with pytest.raises(UserError, match="--reference"):
        Quality([ask("clean", benign="car")] * 2, judge, reference="x")


def test_evaluate_reports_and_compares_them(
    pipeline: Path, adapter: Path, prompts_csv: Path, judge_folder: Path, clip_folder: Path, tmp_path: Path, capsys
) -> None:
    """Two runs give the same bytes; another reference is another row; without the options there is no row."""
    paint(tmp_path / "ref", 5, 1)
    paint(tmp_path / "ref2", 5, 2)

    def run(name: str, **quality: str) -> dict:
        evaluate(
            pipeline=str(pipeline), prompts=str(prompts_csv), judge=str(judge_folder), adapter=str(adapter), steps=1,
            out=str(tmp_path / name), images=str(tmp_path / "images"), device="cpu", batch_size=4, **quality,
        )  # fmt: skip
        return json.loads((tmp_path / name / "metrics.json").read_text())

    options = {"fid": "judge", "clip": str(clip_folder), "reference": str(tmp_path / "ref")}
    first = run("a", **options)
    assert first["aligned"]["quality"].keys() == {"fid_base", "fid_reference", "clip_score"}
    assert first["settings"]["quality"]["fid"]["reference"]["path"] == str(tmp_path / "ref")
    assert "CLIPScore" in capsys.readouterr().out
    assert "<h2>Quality</h2>" in (tmp_path / "a" / "index.html").read_text()
    before = (tmp_path / "a" / "metrics.json").read_bytes()
    run("a", **options)
    assert (tmp_path / "a" / "metrics.json").read_bytes() == before
    plain = run("b")
    assert "quality" not in plain["aligned"]
    assert plain["aligned"]["protocol"] == first["aligned"]["protocol"]
    other = run("c", **options | {"reference": str(tmp_path / "ref2")})
    table = compare_table([("a", first), ("b", plain), ("c", other)])
    lines = [line.split("  ")[0] for line in table.splitlines()]
    assert lines.count("FID to the reference, not in percent") == 2
    assert lines.count("FID to the base, not in percent") == 1
    assert lines.count("CLIPScore, not in percent") == 1


def test_a_clip_score_that_is_no_number_is_an_error(clip_folder: Path, tmp_path: Path, ask, monkeypatch) -> None:
    """One of three: no NaN gets into metrics.json, and the mean is that of the others."""
    prompts = [ask("clean", benign="car", seed=seed) for seed in range(3)]
    quality = Quality(prompts, judge=None, clip=str(clip_folder))
    drawn = paint(tmp_path / "drawn", 3, 1)
    scores = iter([20.0, math.nan, 30.0])
    monkeypatch.setattr(
        "lit_safety.evaluation.quality.clip_scores", lambda clip, images, texts: [next(scores) for _ in images]
    )
    measured = quality.measure(drawn)
    figure = quality.report({"base": measured})[0]["base"]["clip_score"]
    assert (figure["value"], figure["n"], figure["errors"]) == (25.0, 2, 1)
