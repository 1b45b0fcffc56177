"""Jobs that draw several arms: a row of the table for each, the heat map, the growth plot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from lit_safety.core.errors import UserError
from lit_safety.study.plan import Growth, HeatMap, Job, Study, jobs_of
from lit_safety.study.run import Result, append_result, collect, read_results
from lit_safety.study.table import cells, growth, heatmap, lines, markdown, newest, newest_by_row

HEAT = HeatMap("alone", "by category")
GROWTH = Growth("ip", "experts", {"alone": 1, "two": 2, "four": 4}, common={"alone": "own"})
FIGURES = {
    "ip": "arms.{arm}.ip",
    "own": "arms.{arm}.by.{arm}",
    "seconds": "{arm}/report.json#seconds",
    "by category": "each:arms.{arm}.by",
}


def study(folder: Path, **changes: object) -> Study:
    rows: dict[str, dict[str, dict[str, object]]] = {
        "fit": {"fit": {}},
        **{row: {"evaluate": {"words": ["{folder:fit}"]}} for row in ("alone", "two", "four")},
    }
    given: dict[str, object] = {"out": str(folder), "rows": rows, "figures": FIGURES, "prepare": ["fit"]}
    given |= {"baseline": {"ip": "base.ip"}, "percent": ["ip", "own", "by category"], "seeds": [0, 1]}
    return Study(**{**given, **changes})  # type: ignore[arg-type]


def finish(plan: Study, row: str, seed: int, arms: dict[str, dict[str, float]]) -> Result:
    """Note a job that left these shares by arm and category."""
    job: Job = next(job for job in jobs_of(plan) if (job.row, job.seed) == (row, seed))
    told = {name: {"ip": sum(by.values()) / len(by), "by": by} for name, by in arms.items()}
    job.folder.mkdir(parents=True)
    if job.metrics is not None:
        job.metrics.parent.mkdir()
        base = {"ip": 1.0, "by": dict.fromkeys(("hate", "sexual"), 1.0)}
        job.metrics.write_text(json.dumps({"base": base, "arms": {"base": base, **told}}))
    for name in list(arms)[:1]:
        (job.folder / name).mkdir()
        (job.folder / name / "report.json").write_text('{"seconds": 7}')
    result = collect(plan, job, 1.0)
    append_result(Path(plan.out), result)
    return result


@pytest.fixture
def done(tmp_path: Path) -> Study:
    """Two experts alone and merged, by sum and by mean, at two seeds."""
    plan = study(tmp_path)
    for seed in (0, 1):
        finish(plan, "fit", seed, {})
        finish(
            plan, "alone", seed, {"hate": {"hate": 0.0, "sexual": 0.5}, "sexual": {"hate": 1.0, "sexual": 0.2 * seed}}
        )
        finish(
            plan, "two", seed, {"sum": {"hate": 0.0, "sexual": 0.1}, "mean": {"hate": 0.5, "sexual": 0.5 + 0.2 * seed}}
        )
    return plan


def test_every_arm_is_a_row_of_the_table(done: Study):
    """Of the merges at seeds 0 and 1: sum (0 + 0.1) / 2 twice; mean 0.5 and (0.5 + 0.7) / 2. The base is not an arm."""
    assert markdown(done, newest(done)).splitlines() == [
        "|  | ip (%) | own (%) | seconds |",
        "|---|---|---|---|",
        "| base | 100.0 |  |  |",
        "| alone: hate (2 seeds) | 25.0 (25.0 to 25.0) | 0.0 (0.0 to 0.0) | 7.000 (7.000 to 7.000) |",
        "| alone: sexual (2 seeds) | 55.0 (50.0 to 60.0) | 10.0 (0.0 to 20.0) |  |",
        "| two: sum (2 seeds) | 5.0 (5.0 to 5.0) |  | 7.000 (7.000 to 7.000) |",
        "| two: mean (2 seeds) | 55.0 (50.0 to 60.0) |  |  |",
    ]


def test_results_come_back_from_their_file_as_they_went_in(done: Study):
    (first, *_, last) = read_results(Path(done.out))
    assert (first.row, first.figures, first.arms) == ("fit", {}, {})
    assert last.arms["mean"]["by category"] == {"hate": 0.5, "sexual": 0.7}


def test_the_heat_map_holds_means_over_seeds(done: Study, tmp_path: Path):
    results = newest_by_row(done)
    assert cells(HEAT, results["alone"]) == {
        "hate": {"hate": 0.0, "sexual": 0.5}, "sexual": {"hate": 1.0, "sexual": 0.1},
    }  # fmt: skip
    with Image.open(heatmap(HEAT, done, results, tmp_path / "heat.png")) as image:
        assert image.size == (440, 275)
    with pytest.raises(UserError, match=r"row four .*by category"):
        heatmap(HeatMap("four", "by category"), done, results, tmp_path / "none.png")


def test_every_line_begins_where_one_expert_stands(done: Study, tmp_path: Path):
    """One expert alone, mean of the own categories: (0 + 0) / 2 and (0 + 0.2) / 2; a row not done is left out."""
    results = newest_by_row(done)
    found = lines(GROWTH, results)
    assert found == {
        "sum": {1: [0.0, pytest.approx(0.1)], 2: [pytest.approx(0.05)] * 2},
        "mean": {1: [0.0, pytest.approx(0.1)], 2: [0.5, pytest.approx(0.6)]},
    }
    with Image.open(growth(GROWTH, done, results, tmp_path / "growth.png")) as image:
        assert image.size == (990, 550)
    with pytest.raises(UserError, match=r"growth plot .*ip"):
        growth(GROWTH, done, {}, tmp_path / "none.png")


def test_a_column_of_what_was_not_measured_says_so(tmp_path: Path) -> None:
    plan = study(tmp_path, figures={"ip": "arms.{arm}.ip", "unnamed": "arms.{arm}.unnamed_recall.harmless"}, seeds=[0])
    job = next(job for job in jobs_of(plan) if job.row == "alone")
    assert job.metrics is not None
    job.metrics.parent.mkdir(parents=True)
    arm = {"ip": 0.5, "unnamed_recall": {"harmless": "not measured"}}
    job.metrics.write_text(json.dumps({"base": arm, "arms": {"base": arm, "hate": arm}}))
    append_result(Path(plan.out), collect(plan, job, 1.0))
    assert markdown(plan, newest(plan)).splitlines()[-1] == "| alone: hate (1 seed) | 50.0 | not measured |"


def test_rows_on_different_models_have_a_base_each(tmp_path: Path) -> None:
    plan = Study(out=str(tmp_path), figures={"ip": "aligned.ip"}, percent=["ip"], rows={})
    one, other = (Result(row, 0, "", 1.0, {"ip": 0.1}, {"ip": base}, []) for row, base in (("a", 0.9), ("b", 1.0)))
    assert markdown(plan, {"a": [one], "b": [other]}).splitlines()[2:4] == [
        "| base of a | 90.0 |",
        "| base of b | 100.0 |",
    ]
    assert markdown(plan, {"a": [one], "c": [one]}).splitlines()[2:4] == ["| base | 90.0 |", "| a (1 seed) | 10.0 |"]
