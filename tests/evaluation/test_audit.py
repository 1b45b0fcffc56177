"""`judge-audit`, and what an evaluation does with it."""

import json
from pathlib import Path

import pytest
from PIL import Image

from lit_safety.core.errors import UserError
from lit_safety.core.intervals import KnownError, corrected_rate
from lit_safety.evaluation.audit import CAVEAT, judge_audit, read_audit, score_of
from lit_safety.evaluation.command import evaluate
from lit_safety.evaluation.metrics import NOT_JUDGED
from lit_safety.judges.judge import JudgeError, Verdict
from tests.conftest import write_pairs


class Redness:
    """Harmful: red of at least 100, by a score; an image of one pixel cannot be judged."""

    def __init__(self, threshold: float = 0.4, categories: list[str] | None = None) -> None:
        self.threshold, self.name = threshold, "redness"
        self.settings = {"name": self.name, "labels": [], "threshold": threshold}
        self.settings |= {"categories": categories} if categories is not None else {}

    def judge(self, images: list[Image.Image]) -> list[Verdict | JudgeError]:
        found: list[Verdict | JudgeError] = []
        for image in images:
            red = image.getpixel((0, 0))[0] / 255
            verdict = Verdict(red >= self.threshold, {}, {"violence": red}, max(red, 1 - red))
            found.append(JudgeError("too small") if image.width == 1 else verdict)
        return found


@pytest.fixture
def judges(monkeypatch) -> dict:
    found = {"a": Redness()}
    monkeypatch.setattr("lit_safety.judges.load.load_judge", lambda spec: found[spec])
    return found


def paint(file: Path, red: int, width: int = 4) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, 4), (red, 0, 0)).save(file)


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Of 4 violent images 3 are red, of 2 sexual ones 1; of 4 safe ones 1; one cannot be judged; one has no label."""
    top = tmp_path / "labelled"
    for i, red in enumerate((250, 200, 150, 10)):
        paint(top / "harmful" / "violence" / f"{i}.png", red)
    for i, red in enumerate((240, 20)):
        paint(top / "harmful" / "Nudity" / f"{i}.png", red)
    for i, red in enumerate((0, 30, 60, 130)):
        paint(top / "safe" / f"{i}.png", red)
    paint(top / "safe" / "one.png", 0, width=1)
    paint(top / "else.png", 0)
    return top


def test_sensitivity_specificity_categories_and_curve(labelled: Path, judges: dict, tmp_path: Path, capsys) -> None:
    """Golden: counted by hand from the images' red."""
    found = judge_audit("a", images=str(labelled), out=str(tmp_path / "audit"))
    counts = {
        key: (found[key]["hits"], found[key]["n"], found[key]["errors"]) for key in ("sensitivity", "specificity")
    }
    assert counts == {"sensitivity": (4, 6, 0), "specificity": (3, 4, 1)}
    by = {name: (one["sensitivity"]["hits"], one["sensitivity"]["n"]) for name, one in found["by_category"].items()}
    assert by == {"violence": (3, 4), "sexual": (1, 2)}
    assert found["source"]["unlabelled"] == 1
    curve = {round(row["threshold"] * 255): (row["sensitivity"], row["specificity"]) for row in found["curve"]}
    assert curve[0] == (1, 0)
    assert curve[130] == (4 / 6, 3 / 4)
    assert curve[250] == (1 / 6, 1)
    assert json.loads((tmp_path / "audit" / "audit.json").read_text()) == found
    page = (tmp_path / "audit" / "index.html").read_text()
    assert "66.7%" in page
    assert CAVEAT in page
    assert "sensitivity" in capsys.readouterr().out


def test_what_the_judge_does_not_see_is_not_judged(labelled: Path, judges: dict, tmp_path: Path) -> None:
    judges["a"] = Redness(categories=["violence"])
    found = judge_audit("a", images=str(labelled), out=str(tmp_path / "audit"))
    assert found["sensitivity"]["n"] == 4
    assert found["not_judged"] == {"sexual": 2}
    assert list(found["by_category"]) == ["violence"]


def test_a_table_of_labels(labelled: Path, judges: dict, tmp_path: Path) -> None:
    rows = ["harmful/violence/0.png,1,violence", "harmful/violence/3.png,1,Violence;sexual", "safe/0.png,0,",
            "safe/1.png,,"]  # fmt: skip
    (labelled / "labels.csv").write_text("\n".join(["file_name,harmful,category", *rows, ""]))
    found = judge_audit("a", images=str(labelled), out=str(tmp_path / "audit"))
    assert (found["n"], found["sensitivity"]["hits"], found["sensitivity"]["n"]) == (3, 1, 2)
    assert found["source"]["unlabelled"] == 9
    assert found["by_category"]["sexual"]["sensitivity"]["hits"] == 0
    for bad, says in (("no.png,1,", "no.png"), ("safe/0.png,maybe,", "maybe"), ("safe/0.png,0,rude", "rude"),
                      ("../labelled/safe/0.png,0,", "../labelled")):  # fmt: skip
        (labelled / "labels.csv").write_text(f"file_name,harmful,category\n{bad}\n")
        with pytest.raises(UserError, match=says):
            judge_audit("a", images=str(labelled), out=str(tmp_path / "audit"))


def test_shards_are_labelled_images_too(judges: dict, tmp_path: Path) -> None:
    write_pairs(tmp_path / "shards", count=5)
    found = judge_audit("a", shards=str(tmp_path / "shards"), out=str(tmp_path / "audit"))
    assert found["n"] == 10
    assert found["sensitivity"]["n"] == found["specificity"]["n"] == 5
    assert found["by_category"]["violence"]["sensitivity"]["n"] == 3


def test_judges_agree_by_share_and_kappa(labelled: Path, judges: dict, tmp_path: Path) -> None:
    """At 230 the second calls 2 of 10 harmful, the first 5: they agree on 7; by chance 0.5 x 0.2 + 0.5 x 0.8 = 0.5."""
    judges["b"] = Redness(0.9)
    judges["b"].name = "other"
    found = judge_audit("a", images=str(labelled), out=str(tmp_path / "audit"), second_judges=["b"])
    (one,) = found["agreement"]
    assert (one["hits"], one["n"], one["errors"]) == (7, 10, 1)
    assert one["kappa"] == pytest.approx((0.7 - 0.5) / 0.5)
    assert found["second_judges"]["other"]["sensitivity"]["hits"] == 2


def test_what_cannot_be_measured_is_said(labelled: Path, judges: dict, tmp_path: Path) -> None:
    out = str(tmp_path / "audit")
    with pytest.raises(UserError, match="--shards"):
        judge_audit("a", out=out)
    paint(tmp_path / "flat" / "a.png", 0)
    with pytest.raises(UserError, match="none of its"):
        judge_audit("a", images=str(tmp_path / "flat"), out=out)
    paint(tmp_path / "odd" / "harmful" / "rudeness" / "a.png", 0)
    with pytest.raises(UserError, match="rudeness"):
        judge_audit("a", images=str(tmp_path / "odd"), out=out)
    paint(tmp_path / "small" / "safe" / "a.png", 0, width=1)
    with pytest.raises(UserError, match="too small"):
        judge_audit("a", images=str(tmp_path / "small"), out=out)


def test_a_score_is_the_largest_category_or_the_only_label() -> None:
    assert score_of(Verdict(True, {}, {"hate": 0.2, "sexual": 0.7})) == 0.7
    assert score_of(Verdict(True, {"inappropriate": 0.6})) == 0.6
    assert score_of(Verdict(True, {"a": 0.6, "b": 0.7})) is None


def test_a_report_corrects_its_rates(
    labelled: Path, judges: dict, pipeline: Path, prompts_csv: Path, tmp_path: Path, capsys
) -> None:
    judge_audit("a", images=str(labelled), out=str(tmp_path / "audit"))
    given = {"pipeline": str(pipeline), "prompts": str(prompts_csv), "judge": "a", "out": str(tmp_path / "report")}
    given |= {"steps": 1, "batch_size": 16, "device": "cpu"}
    found = evaluate(**given, audit=str(tmp_path / "audit"))
    counts = found["base"]["counts"]["ip"]
    value, interval = corrected_rate(counts["hits"], counts["n"], KnownError(4, 6, 3, 4), counts["errors"])
    assert found["base"]["corrected"]["ip"]["value"] == value
    assert found["base"]["corrected"]["ip"]["interval"] == list(interval)
    by = found["base"]["corrected"]["ip_by_category"]
    one = found["base"]["counts"]["ip_by_category"]["violence"]
    assert by["violence"]["value"] == corrected_rate(one["hits"], one["n"], KnownError(3, 4, 3, 4))[0]
    assert "shocking" not in by
    page = (tmp_path / "report" / "index.html").read_text()
    assert "Corrected rates" in page
    assert CAVEAT in page
    assert "corrected" in capsys.readouterr().out
    assert "| corrected for the judge's errors |" in (tmp_path / "report" / "table.md").read_text()
    judges["a"] = Redness(0.5)
    with pytest.raises(UserError, match="--audit"):
        evaluate(**given, audit=str(tmp_path / "audit"))


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 1, "kind": "judge-audit"}', '{"format": 2}'])
def test_a_file_that_is_no_audit(tmp_path: Path, content: str) -> None:
    (tmp_path / "audit.json").write_text(content)
    with pytest.raises(UserError, match=r"audit\.json"):
        read_audit(str(tmp_path))
    assert NOT_JUDGED
