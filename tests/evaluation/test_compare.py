import copy
import json
from pathlib import Path

import pytest

from lit_safety.core.errors import UserError
from lit_safety.evaluation.compare import compare, compare_table
from lit_safety.evaluation.metrics import NOT_MEASURED, answers, say_absent, summarise
from lit_safety.judges.judge import Verdict


@pytest.fixture
def report(ask) -> dict:
    prompt = ask("explicit", "violence", "gun")
    settings = {
        "judge": {"name": "A"},
        "prompts": "p.csv",
        "prompts_sha256": "abcdef0123",
        "scheduler": "DDIM",
        "steps": 20,
    }
    settings["guidance"] = 5.0

    def arm(harmful: int) -> dict:
        rows = [answers(prompt, Verdict(i < harmful), ()) for i in range(10)]
        return {"n": 10, "errors": 0, **summarise(rows), "protocol": "one", "settings": settings}

    return {"format": 1, "arms": {"base": arm(8), "aligned": arm(1)}, "differences": {}}


def cells(table: str, row: str) -> str:
    (line,) = [line for line in table.splitlines() if line.startswith(row)]
    return line


def test_one_protocol_is_one_row_and_a_shared_arm_one_column(report: dict) -> None:
    other = copy.deepcopy(report)
    other["arms"]["aligned"] = copy.deepcopy(report["arms"]["base"]) | {"ip": 0.5}
    table = compare_table([("a/metrics.json", report), ("b", other)])
    head = table.splitlines()[0]
    assert head.split("  ") != head
    assert [name for name in ("a: base", "a: aligned", "b: base", "b: aligned") if name in head] == [
        "a: base", "a: aligned", "b: aligned",
    ]  # fmt: skip
    row = cells(table, "IP, explicit")
    assert row.index("80.0") < row.index("10.0") < row.index("50.0")
    assert "protocol" not in table.lower()


def test_other_protocols_stand_in_other_rows(report: dict) -> None:
    other = copy.deepcopy(report)
    for arm in other["arms"].values():
        arm["protocol"] = "two"
        arm["settings"]["steps"] = 50
    table = compare_table([("a", report), ("b", other)])
    rows = [line for line in table.splitlines() if line.startswith("IP, explicit")]
    assert len(rows) == 2
    assert all(row.count("80.0") == 1 for row in rows)
    assert "DDIM 20 steps" in table
    assert "DDIM 50 steps" in table
    assert "must not be compared" in table


def test_an_edit_is_a_protocol_of_its_own_and_a_judge_from_the_hub_has_no_hash(report: dict) -> None:
    other = copy.deepcopy(report)
    for arm in other["arms"].values():
        arm["protocol"] = "two"
        arm["settings"] |= {"judge": {"name": "B", "sha256": None}}
        arm["settings"]["edit"] = {"task": "image_to_image", "strength": 0.7}
    table = compare_table([("a", report), ("b", other)])
    assert "judge B , prompts" in table
    assert "image to image at strength 0.7" in table


def test_prints_the_table_of_files_and_folders(report: dict, tmp_path: Path, capsys) -> None:
    (tmp_path / "run").mkdir()
    for file in (tmp_path / "run" / "metrics.json", tmp_path / "old.json"):
        file.write_text(json.dumps(report))
    compare([str(tmp_path / "run"), str(tmp_path / "old.json")])
    assert "10  80.0 [49.0, 94.3]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is not JSON"),
        ("[1]", "metrics.json"),
        ('{"format": 9}', "format 1"),
        ('{"format": 1}', "lacks the arms"),
        ('{"format": 1, "arms": {"a": {"ip": 1}}}', "lacks the arms"),
        ('{"format": 1, "attacks": {}, "protocol": {}}', "lacks the arms"),
    ],
)
def test_files_that_are_no_reports(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=says):
        compare([str(tmp_path / "a.json")] * 2)


def test_too_few_or_absent_reports(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="two or more"):
        compare([str(tmp_path)])
    with pytest.raises(UserError, match="cannot be read"):
        compare([str(tmp_path), str(tmp_path)])


def test_named_is_next_to_unnamed_and_what_was_not_measured_is_said(report: dict) -> None:
    """Also of a report that an earlier version wrote."""
    table = compare_table([("a", report), ("b", copy.deepcopy(report))])
    rows = [line for line in table.splitlines() if line.startswith("recall,")]
    assert [("unnamed" in row, row.count(NOT_MEASURED)) for row in rows] == [(False, 2), (True, 2)]


def test_a_report_that_says_not_measured_may_be_compared(report: dict, tmp_path: Path, capsys) -> None:
    for name, arm in report["arms"].items():
        report["arms"][name] = say_absent(arm)
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(json.dumps(report))
    compare([str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    assert NOT_MEASURED in capsys.readouterr().out
