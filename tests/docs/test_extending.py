"""docs/how-to/extending.md, run unchanged: its files are written out, and its commands are called."""

from __future__ import annotations

import ast
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from lit_safety.__main__ import main
from tests.helpers.documents import ROOT

PAGE = (ROOT / "docs" / "how-to" / "extending.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"```\w+\n# (\S+)\n(.*?)```", PAGE, re.DOTALL))
JOINED = re.sub(r"\\\n\s+", " ", PAGE)
FITS = re.findall(r"^    python -m lit_safety (fit .*)$", JOINED, re.MULTILINE)
(ATTACK,) = re.findall(r"^    python -m lit_safety (attack .*)$", JOINED, re.MULTILINE)
GUARD, JUDGE = re.findall(r"^    python -m lit_safety (evaluate .*)$", JOINED, re.MULTILINE)


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in FILES:
        sys.modules.pop(Path(name).stem, None)


@pytest.mark.parametrize("command", FITS)
def test_the_commands_train(command: str, example: Path, tiny_pipeline: Path, pair_shards: Path):
    small = {
        "model.init_args.pretrained": tiny_pipeline,
        "model.init_args.drawing.steps": 2,
        "data.init_args.train": pair_shards,
        "data.init_args.val": pair_shards,
        "data.init_args.batch_size": 4,
        "data.init_args.num_workers": 0,
        "trainer.max_steps": 2,
        "trainer.val_check_interval": 2,
        "trainer.accelerator": "cpu",
    }
    assert main([*command.split(), *(f"--{key}={value}" for key, value in small.items())]) == 0
    run = example / "runs" / "scdpo" / "latest"
    assert (run / "adapter" / "pytorch_lora_weights.safetensors").is_file()
    overlay = yaml.safe_load(FILES[command.split()[-1]])["model"]
    resolved = yaml.safe_load((run / "config.yaml").read_text())["model"]
    assert resolved["class_path"] == overlay.get("class_path", "lit_safety.modules.SCDPO")
    if "init_args" in overlay:
        assert resolved["init_args"]["objective"]["class_path"] == overlay["init_args"]["objective"]["class_path"]


def test_the_objective_and_the_module_take_less_than_twenty_lines():
    trained = {Path(command.split()[-1]).with_suffix(".py").name for command in FITS}
    modules = {name: text for name, text in FILES.items() if name in trained}
    assert len(modules) == 2
    for text in modules.values():
        (definition,) = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
        assert definition.end_lineno is not None
        assert len(text.splitlines()) < 20


def test_late_timesteps_are_late(example: Path, tiny_pipeline: Path):
    """Fractions lie in [0.4, 1): of 1,000 timesteps none is below 400."""
    from types import SimpleNamespace

    from late_timesteps import LateTimesteps

    module = LateTimesteps(str(tiny_pipeline))
    module.configure_model()
    steps = module.timesteps(SimpleNamespace(seeds=list(range(64))))
    assert 400 <= steps.min() < 500
    assert steps.max() < 1000


def test_the_attack_attacks(example: Path, tiny_pipeline: Path):
    small = {"pipeline": tiny_pipeline, "explicit": 1, "steps": 1, "second_judges": "null", "device": "cpu"}
    small["other_world"] = "true"
    assert main([*shlex.split(ATTACK), *(f"--{key}={value}" for key, value in small.items())]) == 0
    found = json.loads((example / "runs" / "shouting" / "attacks.json").read_text())["attacks"]["shouting"]
    assert [point["budget"] for point in found["arms"]["base"]] == [0, 2, 3]


def test_the_guard_guards(example: Path, tiny_pipeline: Path):
    """`knife` is in the requested prompts of violence: the guarded arm draws what the empty prompt gives."""
    small = {"pipeline": tiny_pipeline, "steps": 1, "device": "cpu", "reference": "null", "clip": "null"}
    small |= {"categories": '["violence"]', "other_world": "true"}
    few = {"explicit": 1, "implicit": 0, "lookalike": 0, "clean": 1}
    assert main([*shlex.split(GUARD), *(f"--{key}={value}" for key, value in (small | few).items())]) == 0
    metrics = json.loads((example / "runs" / "guard" / "metrics.json").read_text())
    assert metrics["arms"]["without word"]["settings"]["guard"] == {"guard": "without word", "word": "knife"}


def test_the_judge_judges(example: Path, tiny_pipeline: Path):
    small = {
        "pipeline": tiny_pipeline,
        "adapter": "null",
        "steps": 1,
        "device": "cpu",
        "reference": "null",
        "clip": "null",
        "other_world": "true",
    }
    few = {"explicit": 1, "implicit": 0, "lookalike": 0, "clean": 1, "categories": '["hate"]'}
    assert main([*shlex.split(JUDGE), *(f"--{key}={value}" for key, value in (small | few).items())]) == 0
    metrics = json.loads((example / "runs" / "redness" / "metrics.json").read_text())
    assert metrics["base"]["errors"] == 0
    assert metrics["base"]["n"] == 2
