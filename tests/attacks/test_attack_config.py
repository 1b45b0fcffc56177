"""configs/attack.yaml: it parses, and every attack of it does a step on the toy world."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from lit_safety.__main__ import main
from tests.helpers.documents import CONFIGS

CONFIG = CONFIGS / "attack.yaml"
SHORT = {
    "tries": 1, "budgets": [1], "batch": 1, "steps": [1], "pictures": 1, "batch_size": 1, "scales": [0.0],
    "weights": [1.0], "samplers": [{"steps": 2}],
}  # fmt: skip


def test_it_parses(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["attack", "--config", str(CONFIG), "--out", "x", "--print_config"])
    assert ended.value.code == 0
    printed, given = yaml.safe_load(capsys.readouterr().out), yaml.safe_load(CONFIG.read_text())
    assert set(given) <= set(printed)
    for name, attack in given["attacks"].items():
        assert set(attack["init_args"]) <= set(printed["attacks"][name]["init_args"]), name
    assert set(printed["arms"]) == set(given["arms"])


@pytest.mark.slow
def test_every_attack_does_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped file with one prompt of each category, the shortest budgets, and the base alone."""
    monkeypatch.chdir(CONFIG.parents[1])
    given = yaml.safe_load(CONFIG.read_text())
    given |= {"arms": None, "explicit": 1, "steps": 1, "second_judges": None, "out": str(tmp_path / "out")}
    for name, attack in given["attacks"].items():
        short = {key: value for key, value in SHORT.items() if key in attack["init_args"]}
        if name == "style":
            short |= {"steps": 1}
        attack["init_args"] |= short
    file = tmp_path / "attack.yaml"
    file.write_text(yaml.safe_dump(given))
    assert main(["attack", "--config", str(file)]) == 0
    found = json.loads((tmp_path / "out" / "attacks.json").read_text())
    assert found["attacks"].keys() == given["attacks"].keys()
    for name, attack in found["attacks"].items():
        assert attack["arms"].keys() == (set() if name == "scale" else {"base"}), name
        assert all(p["n"] + p["errors"] == 8 for points in attack["arms"].values() for p in points)


def test_a_bad_value_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    given = yaml.safe_load(CONFIG.read_text())
    given["attacks"] = {"scale": {"class_path": "lit_safety.attacks.AdapterScale", "init_args": {"scales": ["far"]}}}
    file.write_text(yaml.safe_dump(given))
    assert main(["attack", "--config", str(file), "--out", "x"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert "scales" in said[0]
