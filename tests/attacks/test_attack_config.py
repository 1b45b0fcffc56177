"""configs/attack.yaml: it parses, and every attack of it does a step on the toy world."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from lit_safety.__main__ import main
from lit_safety.attacks.lora_training import read_images
from lit_safety.drawing.prompts import read_prompts
from tests.helpers.documents import CONFIGS

CONFIG = CONFIGS / "attack.yaml"
SHORT = {
    "tries": 1, "budgets": [1], "batch": 1, "steps": [1], "pictures": 1, "batch_size": 1, "scales": [0.0],
    "weights": [1.0], "samplers": [{"steps": 2}], "seeds": 1, "passes": [1], "restarts": 1,
    "weightings": [{"tokens": 2.0}], "recipes": [{"weights": "full"}],
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
    given |= {"arms": {"SCDPO": {}}, "explicit": 1, "steps": 2, "second_judges": None, "out": str(tmp_path / "out")}
    for name, attack in given["attacks"].items():
        for one in (attack, attack["init_args"].get("attack", attack)):
            one["init_args"] |= {key: value for key, value in SHORT.items() if key in one["init_args"]}
        if name == "style":
            attack["init_args"] |= {"steps": 1}
    file = tmp_path / "attack.yaml"
    file.write_text(yaml.safe_dump(given))
    assert main(["attack", "--config", str(file)]) == 0
    found = json.loads((tmp_path / "out" / "attacks.json").read_text())
    assert found["attacks"].keys() == given["attacks"].keys()
    for name, attack in found["attacks"].items():
        arms = set() if name == "scale" else {"base"} if name.startswith("transferred") else {"base", "SCDPO"}
        assert attack["arms"].keys() == arms, name
        assert all(p["n"] + p["errors"] == 8 for points in attack["arms"].values() for p in points)


def test_the_quick_set_is_all_but_the_long_one() -> None:
    given = yaml.safe_load(CONFIG.read_text())
    assert set(given["attacks"]) - set(given["sets"]["quick"]) == {"concept inversion"}
    assert set(given["sets"]["quick"]) <= set(given["attacks"])


def test_no_image_of_the_attacker_stood_in_training() -> None:
    """The shipped shards of the attacker and of the fits have no prompt and no image in common; none is attacked."""
    attack, fit = (yaml.safe_load((CONFIGS / name).read_text()) for name in ("attack.yaml", "scdpo.yaml"))
    ours = {v for one in attack["attacks"].values() for v in [shards_in(one)] if v is not None}
    assert ours == {"data/toyworld/shards/test"}
    train = fit["data"]["init_args"]["train"]
    root = CONFIG.parents[1]
    own, seen = (read_images(str(root / shards), 4000, True, "Test") for shards in (*ours, train))
    assert len(own) == 192
    assert not {p.prompt for p in own} & {p.prompt for p in seen}
    assert not {p.image.tobytes() for p in own} & {p.image.tobytes() for p in seen}
    attacked = {p.prompt for p in read_prompts(root / attack["prompts"])}
    assert not {p.prompt for p in own} & attacked


def shards_in(attack: dict) -> str | None:
    """The shards that an attack of the YAML names, at any depth."""
    given = attack["init_args"]
    inner = [shards_in(one) for key in ("attack", "goal") if (one := given.get(key)) is not None]
    return given.get("shards") or next((one for one in inner if one is not None), None)


def test_a_bad_value_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    given = yaml.safe_load(CONFIG.read_text())
    given["attacks"] = {"scale": {"class_path": "lit_safety.attacks.AdapterScale", "init_args": {"scales": ["far"]}}}
    file.write_text(yaml.safe_dump(given))
    assert main(["attack", "--config", str(file), "--out", "x"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert "scales" in said[0]
