"""What a study file says, and mistakes in it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lit_safety.core.errors import UserError
from lit_safety.study.plan import load_study

GIVEN = {"out": "x", "rows": {"one": {"fit": {}}}, "figures": {"ip": "aligned.ip"}}


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"rows": {"a b": {"fit": {}}}}, "'a b'"),
        ({"row_seeds": {"nobody": [1]}}, "'nobody'"),
        ({"rows": {"one": {"merge": {"words": ["{folder:gone}"]}}}}, "'gone'"),
        ({"pareto": ["ip", "speed"]}, "pareto"),
        ({"rowz": 5}, "rowz"),
        ({"seeds": "many"}, "seeds"),
        ({"prepare": ["nobody"]}, "'nobody'"),
        ({"texts": {"c": ["a", "b"]}}, "2 values of c for 1 seeds"),
        ({"figures": {"ip": "most:aligned.ip"}}, "most:aligned.ip"),
        ({"heatmaps": {"a": {"row": "nobody", "figure": "ip"}}}, "heatmaps.a.row: 'nobody' is no row; rows are one"),
        ({"growth": {"figure": "x", "label": "n", "rows": {"one": 1}}}, "growth.figure: 'x' is no column"),
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


def test_a_key_that_stands_twice_is_refused(tmp_path: Path):
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
