"""Every shipped YAML: it parses, and every key of it is explained."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lit_safety.__main__ import main
from lit_safety.cli.commands import COMMANDS
from lit_safety.study.plan import jobs_of, load_study
from tests.helpers.documents import CONFIGS

STUDIES = sorted(CONFIGS.glob("studies/*.yaml"))
METHODS = sorted(path for path in CONFIGS.glob("*.yaml") if "\ntrainer:" in path.read_text())
EVALUATIONS = [CONFIGS / f"{name}.yaml" for name in ("evaluate", "baselines", "guards")]


def keys(node: object, prefix: str = "") -> list[str]:
    if isinstance(node, dict):
        return [k for name, value in node.items() for k in [f"{prefix}{name}", *keys(value, f"{prefix}{name}.")]]
    if isinstance(node, list):
        return [k for value in node for k in keys(value, prefix)]
    return []


@pytest.mark.parametrize("config", METHODS, ids=lambda path: path.name)
def test_it_parses(config: Path, capsys: pytest.CaptureFixture[str]):
    """`--print_config` goes through the whole parser; it ends the process with 0, an error with 2."""
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", str(config), "--print_config"])
    assert ended.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    missing = set(keys(yaml.safe_load(config.read_text()))) - set(keys(printed))
    assert not missing


@pytest.mark.parametrize(
    "method",
    [path for path in sorted(CONFIGS.glob("*.yaml")) if path.stem in ("dpo_expert", "psa")],
    ids=lambda path: path.name,
)
def test_a_models_overlay_suits_every_method(method: Path, capsys: pytest.CaptureFixture[str]):
    """SDXL's names most keys; each overlay's own run over scdpo.yaml is in test_fit_backbones.py."""
    overlay = CONFIGS / "models" / "sdxl.yaml"
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", str(method), "--config", str(overlay), "--print_config"])
    assert ended.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    missing = set(keys(yaml.safe_load(overlay.read_text()))) - set(keys(printed))
    assert not missing
    assert printed["model"]["init_args"]["pretrained"] == "stabilityai/stable-diffusion-xl-base-1.0"


@pytest.mark.parametrize("config", EVALUATIONS, ids=lambda path: path.name)
def test_an_evaluation_parses(config: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "--config", str(config), "--out", "x", "--print_config"])
    assert ended.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    given = yaml.safe_load(config.read_text())
    assert set(given) <= set(printed)
    assert set(given.get("arms", {})) == set(printed["arms"] or {})


@pytest.mark.parametrize("config", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.name)
def test_every_key_is_explained(config: Path):
    """Each key has a comment above it, or above the class or group that it opens."""
    structural = ("class_path:", "init_args:", "- class_path:")
    lines = config.read_text().splitlines()
    folded = False
    for number, line in enumerate(lines):
        text = line.strip()
        folded = folded and line.startswith(" ") and not text.startswith(("- ", "#"))  # lines of one long text
        if folded or text == "- >-":
            folded = True
            continue
        if config in STUDIES and line.startswith(" "):  # names of rows, and options of commands that explain them
            continue
        opens = text.endswith(":") and not line.startswith(" ")
        if not text or text.startswith(("#", "- ")) or text.startswith(structural) or opens:
            continue
        before = [other.strip() for other in lines[:number] if other.strip()]
        above = next(other for other in reversed(before) if not other.startswith(structural))
        assert above.startswith("#"), f"{config.name}:{number + 1}: {text} has no comment"


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.name)
def test_every_option_of_a_study_is_one_of_its_command(study: Path):
    """All commands go through their own parsers; of calls that differ in values only, the first one does."""
    calls = {}
    for words in (words for job in jobs_of(load_study(str(study))) for words in job.commands):
        command = words[:2] if isinstance(COMMANDS.get(words[0]), dict) else words[:1]
        names = frozenset(word.partition("=")[0] for word in words if word.startswith("--"))
        calls.setdefault((command, names), words)
    assert calls
    for words in calls.values():
        with pytest.raises(SystemExit) as ended:
            main([*words, "--print_config"])
        assert ended.value.code == 0, f"{study.name}: {' '.join(words)}"
