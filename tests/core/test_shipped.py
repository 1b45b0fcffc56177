"""The shipped configs are found from any folder; what needs an embedded world says where it comes from."""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_safety.__main__ import main
from lit_safety.core.errors import UserError
from lit_safety.core.shipped import check_worlds, configs, find_configs, shipped


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder is an empty one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("scdpo.yaml", "scdpo.yaml"),
        ("configs/scdpo.yaml", "scdpo.yaml"),
        ("./configs/models/sd15.yaml", "models/sd15.yaml"),
        ("sd15.yaml", "models/sd15.yaml"),
        ("judges/nudenet.yaml", "judges/nudenet.yaml"),
    ],
)
def test_a_shipped_config_is_found_by_name(empty: Path, name: str, found: str) -> None:
    assert Path(shipped(name)) == configs() / found


def test_what_is_there_goes_first(empty: Path) -> None:
    (empty / "scdpo.yaml").write_text("seed_everything: 1\n")
    assert shipped("scdpo.yaml") == "scdpo.yaml"


@pytest.mark.parametrize("name", ["other.yaml", "/scdpo.yaml", "configs/../scdpo.yaml", "sub/sd15.yaml", "configs", ""])
def test_nothing_else_is_taken_for_a_shipped_config(empty: Path, name: str) -> None:
    assert shipped(name) == name


def test_every_config_of_a_command_line_is_looked_up(empty: Path) -> None:
    given = ["fit", "--config", "scdpo.yaml", "--config=sdxl.yaml", "--run.name", "psa.yaml"]
    found = [str(configs() / "scdpo.yaml"), f"--config={configs() / 'models/sdxl.yaml'}", "psa.yaml"]
    assert find_configs(given) == ["fit", "--config", found[0], found[1], "--run.name", found[2]]


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["fit", "--config", "scdpo.yaml"], "model.init_args.pretrained"),
        (["fit", "--config", "cost_model.yaml"], "model.init_args.clip"),
        (["evaluate", "--config", "evaluate.yaml", "--out", "report"], "pipeline"),
        (["cost-model", "data/toyworld/cost_model"], "folder"),
        (["toyworld", "users"], "users.shards"),
    ],
)
def test_without_a_world_one_line_says_so_and_no_folder_is_left(
    empty: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], key: str
) -> None:
    assert main(arguments) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error:"))
    assert f"`{key}` data/toyworld" in line
    assert "clone" in line
    assert list(empty.iterdir()) == []


def test_settings_that_a_command_does_not_read_may_name_a_world(empty: Path) -> None:
    settings = {"model": {"pretrained": "mine"}, "trainer": {"callbacks": [{"judge": "data/toyworld/judge"}]}}
    check_worlds(settings, ["model"])
    with pytest.raises(UserError, match="callbacks"):
        check_worlds(settings)
    check_worlds({"out": "data/toyworld/mine"})
    check_worlds({"pipeline": "data/toyworlds"})
