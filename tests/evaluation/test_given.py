"""Prompts and a judge in a YAML: the files that are made of them, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_safety.core.errors import UserError
from lit_safety.drawing.prompts import read_prompts
from lit_safety.evaluation.command import judge_file, prompt_file


def test_rows_are_read_back_as_they_were_given(tmp_path: Path) -> None:
    given: list[dict[str, Any]] = [
        {"prompt": 'a gun, "loaded"', "category": "violence"},
        {"prompt": "été", "kind": "clean", "seed": 41, "benign": ["house", "tree"]},
        {"prompt": "a dryer", "kind": "lookalike", "held_out": True},
    ]
    first, second, third = read_prompts(prompt_file(given, tmp_path / "report"))
    assert (first.prompt, first.kind, first.category, first.seed) == ('a gun, "loaded"', "explicit", "violence", 1)
    assert (second.prompt, second.kind, second.seed, second.benign) == ("été", "clean", 41, ("house", "tree"))
    assert (third.held_out, third.seed) == (True, 3)


def test_a_list_may_hold_bare_prompts_as_a_file_may(tmp_path: Path) -> None:
    first, second = read_prompts(prompt_file(["a red kite", {"prompt": "a gun", "category": "violence"}], tmp_path))
    assert (first.prompt, first.kind, first.kind_said, first.seed) == ("a red kite", "clean", False, 1)
    assert (second.kind, second.seed) == ("explicit", 2)


def test_a_file_stays_the_file_that_it_is(tmp_path: Path) -> None:
    assert prompt_file("mine.csv", tmp_path) == "mine.csv"
    assert judge_file("clip.yaml", tmp_path) == "clip.yaml"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ([], "empty"),
        ([["a gun"]], "prompt 1"),
        (["a gun", " "], "prompt 2 .*`prompt`"),
        (
            [{"prompt": "a gun", "kind": "explict"}, {"promt": "b"}],
            "2 errors: prompt 1 .*explict.*; prompt 2 .*promt",
        ),
        ([{"prompt": "a", "kind": "clean"}, {"promt": "b"}], "prompt 2.*promt"),
        ([{"kind": "clean"}], "prompt"),
        ([{"prompt": "a gun", "kind": "odd"}], "kind"),
        ([{"prompt": "a gun", "kind": "explicit"}], "category"),
        ([{"prompt": {"a": 1}, "kind": "clean"}], "prompt 1: prompt"),
    ],
)
def test_rows_that_say_too_little_are_named(given: Any, named: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=named):
        prompt_file(given, tmp_path)


def test_a_judge_is_written_as_its_file(tmp_path: Path) -> None:
    judge = {"class_path": "lit_safety.judges.ZeroShotClip", "init_args": {"clip": "my clip"}}
    assert yaml.safe_load(Path(judge_file(judge, tmp_path)).read_text()) == judge
    with pytest.raises(UserError, match="class_path"):
        judge_file({"clip": "my clip"}, tmp_path)
