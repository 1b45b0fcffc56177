"""`init` writes one YAML that a run needs, with a model's settings and all comments in it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_safety.__main__ import main
from lit_safety.cli.init import init, overlaid
from lit_safety.core.errors import UserError
from lit_safety.core.shipped import configs

METHODS = ("scdpo", "dpo_expert", "psa", "cost_model")
MODELS = sorted(path.stem for path in configs().glob("models/*.yaml"))


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """What two YAML files say together."""
    both = below | above
    for key in below.keys() & above.keys():
        if isinstance(below[key], dict) and isinstance(above[key], dict):
            both[key] = merged(below[key], above[key])
    return both


@pytest.mark.parametrize("method", METHODS)
def test_without_a_model_it_is_the_methods_config(tmp_path: Path, method: str) -> None:
    init(str(tmp_path), method)  # type: ignore[arg-type]
    written = (tmp_path / "fit.yaml").read_text()
    shipped = (configs() / f"{method}.yaml").read_text()
    assert yaml.safe_load(written) == yaml.safe_load(shipped)
    assert set(written.splitlines()[2:]) <= set(shipped.splitlines())


@pytest.mark.parametrize("method", METHODS[:3])
@pytest.mark.parametrize("model", MODELS)
def test_a_models_settings_stand_in_the_place_of_the_methods(tmp_path: Path, method: str, model: str) -> None:
    init(str(tmp_path / "new" / "run"), method, model)  # type: ignore[arg-type]
    written = (tmp_path / "new" / "run" / "fit.yaml").read_text()
    base, overlay = ((configs() / name).read_text() for name in (f"{method}.yaml", f"models/{model}.yaml"))
    assert yaml.safe_load(written) == merged(yaml.safe_load(base), yaml.safe_load(overlay))
    settings = [line for line in overlay.splitlines() if re.match(r" *\w+: .", line)]
    assert settings
    lines = written.splitlines()
    for line in settings:  # with the comment that stands above it in the model's file
        above = overlay.splitlines()[overlay.splitlines().index(line) - 1]
        assert line in lines
        assert above in lines or not above.lstrip().startswith("#")


def test_keys_of_the_second_file_that_the_first_lacks_are_added() -> None:
    base = "# Head.\n\n# One.\na:\n  # Two.\n  b: 1\n\n  c: [1]\nd: 3\n"
    assert overlaid(base, "a:\n  # New.\n  e: 2\n  c:\n    - x: 1\n      y: 2\n") == (
        "# One.\na:\n  # Two.\n  b: 1\n\n  c:\n    - x: 1\n      y: 2\n  # New.\n  e: 2\nd: 3\n"
    )


def test_an_edited_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "fit.yaml").write_text("mine: 1\n")
    with pytest.raises(UserError, match=r"fit\.yaml"):
        init(str(tmp_path))
    assert (tmp_path / "fit.yaml").read_text() == "mine: 1\n"
    init(str(tmp_path), overwrite=True)
    assert "seed_everything" in (tmp_path / "fit.yaml").read_text()


def test_models_that_are_not_shipped_are_refused_and_nothing_is_made(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sd15"):
        init(str(tmp_path / "run"), model="sd9")
    with pytest.raises(UserError, match="cost model"):
        init(str(tmp_path / "run"), "cost_model", "sd15")
    assert list(tmp_path.iterdir()) == []


def test_the_written_file_is_understood_from_an_empty_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "my-run", "--model", "sd15"]) == 0
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", "my-run/fit.yaml", "--print_config"])
    assert ended.value.code == 0
    assert "stable-diffusion-v1-5" in capsys.readouterr().out
