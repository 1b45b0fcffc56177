"""Which file a complaint is about."""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_safety.core.check_config import name_file

FIRST = "model: {init_args: {pretrained: x, objective: {init_args: {beta: 3}}}}\njudge: y\n"
SECOND = "data: {init_args: {train: x}}\narms: {mine: {guard: {class_path: a.B}}}\n"


@pytest.mark.parametrize(
    ("said", "file"),
    [
        ("`model.init_args.objective.init_args.beta`: is wrong", "first.yaml"),
        ("`model.init_args.objective`: Option 'beta' is not accepted", "first.yaml"),
        ("beta must be above 0, got 3", "first.yaml"),
        ("--judge y: no such folder", "first.yaml"),
        ("data.init_args.train: x does not exist", "second.yaml"),
        ("`arms.init_args.guard`: no such class", "second.yaml"),
        ("`trainer.max_steps`: is wrong", None),
        ("second.yaml: `judge`: is wrong", None),
        ("the disk is full", None),
    ],
)
def test_the_last_file_that_says_the_key_is_named(
    said: str, file: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("first.yaml").write_text(FIRST)
    Path("second.yaml").write_text(SECOND)
    words = ["fit", "--config", "first.yaml", "--config=second.yaml"]
    assert name_file(said, words) == (said if file is None else f"{file}: {said}")


def test_an_option_behind_the_file_is_no_fault_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("first.yaml").write_text(FIRST)
    said = "--judge z: no such folder"
    assert name_file(said, ["evaluate", "--config", "first.yaml", "--judge", "z"]) == said
    assert name_file(said, ["evaluate", "--judge", "z", "--config", "first.yaml"]) == f"first.yaml: {said}"
