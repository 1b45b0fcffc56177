"""Which prompts regmean looks at: each expert's own, what must stay, and nothing that reports are made with."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from lit_safety.core.errors import UserError
from lit_safety.drawing.worlds import refuse_reports_own
from lit_safety.merging.options import CalibrationOptions, Recipe
from lit_safety.merging.own_prompts import check_own_prompts, own_prompts

ROWS = [
    *(f"explicit hate {n},explicit,hate,0" for n in range(5)),
    *(f"implicit hate {n},implicit,hate,0" for n in range(5)),
    *(f"held out hate {n},implicit,hate,1" for n in range(50)),
    "of two,explicit,violence;hate,0",
    "violent,explicit,Violence,0",
    *(f"clean {n},clean,,0" for n in range(9)),
    *(f"lookalike {n},lookalike,,0" for n in range(9)),
]
WORLD = Path("data/toyworld")


def write(file: Path, rows: list[str]) -> str:
    file.write_text("\n".join(["prompt,kind,category,held_out", *rows]) + "\n")
    return str(file)


def test_kinds_are_dealt_alike_and_held_out_rows_left_out(tmp_path: Path):
    options = CalibrationOptions(each=4, clean=6)
    found = own_prompts(write(tmp_path / "a.csv", ROWS), ["hate", "violence"], Recipe(), options)
    assert sorted(prompt.split()[0] for prompt in found.own["hate"]).count("implicit") == 2
    assert len(found.own["hate"]) == 4
    assert set(found.own["violence"]) == {"violent", "of two"}
    assert [sum(prompt.startswith(kind) for prompt in found.clean) for kind in ("clean", "lookalike")] == [3, 3]
    assert not any("held" in prompt for prompt in found.all())
    shuffled = random.Random(0).sample(ROWS, len(ROWS))
    assert own_prompts(write(tmp_path / "b.csv", shuffled), ["hate", "violence"], Recipe(), options) == found


def test_an_expert_of_another_name_is_given_its_category(tmp_path: Path):
    file = write(tmp_path / "a.csv", ROWS)
    found = own_prompts(file, ["mine"], Recipe(), CalibrationOptions(of={"mine": "Violence"}))
    assert set(found.own["mine"]) == {"violent", "of two"}
    with pytest.raises(UserError, match=r"mine is not a category: .*--calibration\.of"):
        own_prompts(file, ["mine"], Recipe(), CalibrationOptions())
    with pytest.raises(UserError, match=r"--calibration\.of names other, .*mine"):
        own_prompts(file, ["mine"], Recipe(), CalibrationOptions(of={"other": "hate"}))
    with pytest.raises(UserError, match=r"--calibration\.of: unknown category 'guns'"):
        own_prompts(file, ["mine"], Recipe(), CalibrationOptions(of={"mine": "guns"}))


def test_the_null_space_asks_for_clean_prompts_alone(tmp_path: Path):
    file = write(tmp_path / "a.csv", ["clean,clean,,0"])
    recipe = Recipe(method="sum", null_space=1e-3)
    assert own_prompts(file, ["mine", "other"], recipe, CalibrationOptions()).own == {}
    with pytest.raises(UserError, match="no harmful prompt of hate, the category of the expert hate"):
        own_prompts(file, ["hate"], Recipe(), CalibrationOptions())


def test_shards_give_prompts_of_both_kinds(category_shards: Path, pair_shards: Path):
    found = own_prompts(str(category_shards), ["hate", "violence"], Recipe(), CalibrationOptions())
    assert found.own == {"hate": ["a gun and a house"], "violence": ["a gun and a house"]}
    assert found.clean == ["a red cat"]
    check_own_prompts(str(category_shards), ["hate", "violence"], Recipe(), CalibrationOptions())
    for look in (own_prompts, check_own_prompts):
        with pytest.raises(UserError, match="no harmful prompt of sexual"):
            look(str(pair_shards), ["sexual", "violence"], Recipe(), CalibrationOptions())


def test_nothing_is_chosen_by_what_a_worlds_reports_are_made_with():
    for name in ("prompts/test.csv", "shards/test"):
        with pytest.raises(UserError, match="this world's reports"):
            own_prompts(str(WORLD / name), ["hate"], Recipe(), CalibrationOptions())
        with pytest.raises(UserError, match="this world's reports"):
            check_own_prompts(str(WORLD / name), ["hate"], Recipe(), CalibrationOptions())
    with pytest.raises(UserError, match="judge_b"):
        refuse_reports_own([str(WORLD / "prompts/val.csv"), str(WORLD / "judge_b")], "--tune:")
    refuse_reports_own([str(WORLD / "prompts/val.csv"), str(WORLD / "judge"), "test.csv"], "--tune:")
