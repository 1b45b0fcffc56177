"""Names of version 0.1: each is answered with the new one, in Python and in YAML."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

from lit_safety.core.errors import UserError
from lit_safety.core.old_names import HOMES, new_names
from lit_safety.judges.judge import Judge
from lit_safety.judges.load import object_from_file


@pytest.mark.parametrize("module", HOMES)
def test_every_new_name_is_there(module: str) -> None:
    for path in new_names(module).values():
        package, _, name = path.rpartition(".")
        assert package.count(".") == 1  # a package, never a file
        assert getattr(import_module(package), name) is not None


@pytest.mark.parametrize(
    ("module", "name", "now"),
    [
        ("lit_safety.evaluation.safree", "SAFREE", "lit_safety.guards.SAFREE"),
        ("lit_safety.evaluation.nudenet_judge", "NudeNetJudge", "lit_safety.judges.NudeNet"),
        ("lit_safety.modules.selective", "SelectiveBackward", "lit_safety.modules.SelectiveBackward"),
        ("lit_safety.errors", "UserError", "lit_safety.core.UserError"),
        ("lit_safety.data", "CATEGORIES", "lit_safety.core.CATEGORIES"),
    ],
)
def test_python_gets_the_new_name(module: str, name: str, now: str) -> None:
    with pytest.raises(ImportError, match=now):
        exec(f"from {module} import {name}", {})


def test_a_file_that_held_nothing_public_is_answered_by_the_rule() -> None:
    with pytest.raises(ImportError, match=r"lit_safety\.toyworld"):
        import_module("lit_safety.toyworld.scene")


def test_a_class_that_never_was_is_left_to_python() -> None:
    with pytest.raises(ImportError, match="NoSuchObjective"):
        exec("from lit_safety.objectives import NoSuchObjective", {})
    assert not hasattr(import_module("lit_safety.objectives"), "NoSuchObjective")


def test_a_judge_file_gets_the_new_name(tmp_path: Path) -> None:
    file = tmp_path / "judge.yaml"
    file.write_text("class_path: lit_safety.evaluation.q16_judge.Q16Judge\n")
    with pytest.raises(UserError, match=r"lit_safety\.judges\.Q16$") as caught:
        object_from_file(file, Judge, "--judge", "configs/judges/")
    assert str(caught.value).count("\n") == 0
    assert str(file) in str(caught.value)


def test_a_config_gets_the_new_name(tmp_path: Path) -> None:
    from lit_safety.__main__ import main

    config = tmp_path / "old.yaml"
    text = Path("configs/scdpo.yaml").read_text()
    config.write_text(text.replace("lit_safety.objectives.SafetyC", "lit_safety.objectives.ipo.IPO # "))
    said = _error(["fit", "--config", str(config), "--run.root", str(tmp_path / "runs")], main)
    assert "lit_safety.objectives.IPO" in said
    assert "objective" in said
    assert not (tmp_path / "runs").exists()


def _error(arguments: list[str], main: object) -> str:
    import contextlib
    import io

    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        assert main(arguments) == 2  # type: ignore[operator]
    (line,) = (line for line in stderr.getvalue().splitlines() if line.startswith("error:"))
    return line
