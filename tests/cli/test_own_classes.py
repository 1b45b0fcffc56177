"""Classes of somebody's own on the command line: one line that says what to write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lit_safety.__main__ import main

OWN = """
from lit_safety.guards import Guard
from lit_safety.objectives import Objective

class NoGuard:
    pass

class HalfGuard(Guard):
    settings = {}

    def check(self, pipe):
        pass

class Untyped(HalfGuard):
    def __init__(self, strength):
        pass

    def around(self, pipe, prompts):
        pass

class NoSettings(Guard):
    def check(self, pipe):
        pass

    def around(self, pipe, prompts):
        pass

class NoObjective:
    pass

class Empty(Objective):
    pass

class NoModule:
    pass
"""


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_classes.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("NoGuard", ["own_classes.NoGuard", "lit_safety.guards.Guard"]),
        ("HalfGuard", ["own_classes.HalfGuard", "`around(self, pipe"]),
        ("Untyped", ["`strength`", "own_classes.Untyped"]),
        ("NoSettings", ["NoSettings", "`settings`"]),
    ],
)
def test_a_guard_that_is_none(
    name: str, says: list[str], pipeline: Path, prompts_csv: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", "--pipeline", str(pipeline), "--prompts", str(prompts_csv), "--judge", str(tmp_path)]
    guard = ["--arms.x.guard", f"{{class_path: own_classes.{name}}}", "--out", str(tmp_path / "out")]
    assert main([*command, *guard]) == 2
    message = capsys.readouterr().err.strip()
    for word in says:
        assert word in message
    assert len([line for line in message.splitlines() if line.startswith("error")]) == 1


@pytest.mark.parametrize(
    ("option", "name", "says"),
    [
        ("--model.init_args.objective", "NoObjective", "lit_safety.objectives.Objective"),
        ("--model.init_args.objective", "Empty", "`preference(self, m"),
        ("--model", "NoModule", "lit_safety.modules.PreferenceModule"),
    ],
)
def test_an_objective_or_a_module_that_is_none(
    option: str, name: str, says: str, command_line: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command_line("fit", option, f"own_classes.{name}")) == 2
    message = capsys.readouterr().err
    assert name in message
    assert says in message
    assert "Expected a path" not in message
