"""What a study file says, and mistakes in it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lit_safety.core.errors import UserError
from lit_safety.study.plan import jobs_of, load_study

GIVEN = {"out": "x", "rows": {"one": {"fit": {}}}, "figures": {"ip": "aligned.ip"}}


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"rows": {"a/b": {"fit": {}}}}, "'a/b'"),
        ({"rows": {"a ": {"fit": {}}}}, "'a '"),
        ({"grid": {"nobody": {"fit": {"a": [1]}}}}, "grid.*'nobody'"),
        ({"grid": {"one": {"evaluate": {"a": [1]}}}}, r"grid\.one.*'evaluate'"),
        ({"grid": {"one": {"fit": {"a": 1}}}}, r"grid"),
        ({"grid": {"one": {"fit": {"a": []}}}}, r"grid\.one\.fit\.a"),
        ({"grid": {"one": {"fit": {"a": [1, 1]}}}}, r"grid\.one.*a=1"),
        ({"row_seeds": {"nobody": [1]}}, "'nobody'"),
        ({"rows": {"one": {"merge": {"words": ["{folder:gone}"]}}}}, "'gone'"),
        ({"pareto": ["ip", "speed"]}, "pareto"),
        ({"rowz": 5}, "rowz"),
        ({"seeds": "many"}, "seeds"),
        ({"prepare": ["nobody"]}, "'nobody'"),
        ({"texts": {"c": ["a", "b"]}}, "2 values of c for 1 seeds"),
        ({"figures": {"ip": "most:aligned.ip"}}, "most:aligned.ip"),
        ({"heatmaps": {"a": {"row": "nobody", "figure": "ip"}}}, "heatmaps.a.row: 'nobody' is not a row; rows are one"),
        ({"growth": {"figure": "x", "label": "n", "rows": {"one": 1}}}, "growth.figure: 'x' is not a column"),
        ({"growth": {"figure": "ip", "label": "n", "rows": {"one": "many"}}}, "growth"),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path: Path, changes: dict[str, object], names: str):
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump({**GIVEN, **changes}))
    with pytest.raises(UserError, match=names) as error:
        load_study(str(file))
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_key_that_occurs_twice_is_refused(tmp_path: Path):
    file = tmp_path / "study.yaml"
    file.write_text("out: x\nrows:\n  one: &one\n    fit: {}\n  two: *one\n  one:\n    merge: {}\nfigures: {}\n")
    with pytest.raises(UserError, match=r"study\.yaml: .*`one` .*lines 3 and 6"):
        load_study(str(file))
    file.write_text("rows: [{a: 1, b: {c: 1, c: 2}}]")
    with pytest.raises(UserError, match="the key `c` stands twice, in lines 1 and 1"):
        load_study(str(file))
    file.write_text("rows: [")
    with pytest.raises(UserError, match=r"study\.yaml: .*line 1"):
        load_study(str(file))


def test_a_missing_file_is_named():
    with pytest.raises(UserError, match=r"nowhere\.yaml"):
        load_study("nowhere.yaml")


def test_a_grid_makes_a_row_of_each_combination_of_values(tmp_path: Path):
    """2 rates x 3 objectives, in the place of the row; its own options stay, and so do its seeds."""
    loss = "model.init_args.objective"
    hinge = {"class_path": "lit_safety.objectives.Hinge", "init_args": {"beta": 1.0}}
    classes = ["lit_safety.objectives.IPO", hinge, None]
    given = GIVEN | {
        "rows": {
            "first row": {"fit": {}},
            "sweep": {"fit": {"trainer.max_steps": 3}, "evaluate": {"adapter": "{folder}/adapter"}},
        },
        "grid": {"sweep": {"fit": {"model.init_args.lr": [0.1, 1e-05], loss: classes}}},
        "row_seeds": {"sweep": [7]},
    }
    file = tmp_path / "my study.yaml"
    file.write_text(yaml.safe_dump(given, sort_keys=False))
    study = load_study(str(file))
    names = [f"sweep lr={lr} objective={name}" for lr in ("0.1", "1e-05") for name in ("IPO", "Hinge-1", "null")]
    assert list(study.rows) == ["first row", *names]
    fit = study.rows[names[1]]["fit"]
    assert (fit["trainer.max_steps"], fit["model.init_args.lr"]) == (3, 0.1)
    assert (fit[loss]["class_path"], fit[loss]["init_args"]["beta"]) == (hinge["class_path"], 1.0)
    jobs = jobs_of(study)
    assert [(job.row, job.seed) for job in jobs] == [("first row", 0), *((name, 7) for name in names)]
    assert f"--adapter=x/{names[5]}/seed7/adapter" in jobs[6].commands[1]


def test_names_may_hold_blanks(tmp_path: Path):
    file = tmp_path / "study.yaml"
    rows = {"a row": {"fit": {}}, "b": {"merge": {"words": ["{folder:a row}/adapter"]}}}
    file.write_text(yaml.safe_dump(GIVEN | {"rows": rows, "out": str(tmp_path / "my runs")}))
    study = load_study(str(file))
    assert study.needed("b") == ("a row",)
    assert jobs_of(study)[1].commands == (("merge", f"{tmp_path}/my runs/a row/seed0/adapter"),)
