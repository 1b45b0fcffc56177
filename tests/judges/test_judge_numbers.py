"""No number in a judge's files can make it call everything safe, and no nan of a network counts as safe."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lit_safety.core.errors import UserError
from lit_safety.judges.clip import ZeroShotClip
from lit_safety.judges.judge import JudgeError
from lit_safety.judges.load import load_judge
from lit_safety.judges.nudenet import NudeNet
from lit_safety.judges.q16 import Q16
from lit_safety.judges.toy.judge import ToyJudge
from lit_safety.judges.vlm import VLM, read_object

IMAGE = Image.new("RGB", (32, 32), (200, 30, 30))
BAD = ["2", "1", "0", "-1", "NaN", "Infinity", "-Infinity", "1e9", "1e999", '"0.5"', "true", "null"]


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    ToyJudge(width=8).save_pretrained(tmp_path / "toy")
    return tmp_path / "toy"


@pytest.fixture
def cost(tiny_cost_model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_cost_model, tmp_path / "cost")


def edited(folder: Path, **values: Any) -> Path:
    """The folder, with values of its config.json replaced; None takes a key away."""
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps({key: v for key, v in config.items() if v is not None}))
    return folder


def with_threshold(folder: Path, text: str) -> Path:
    config = json.loads((folder / "config.json").read_text()) | {"threshold": "HERE"}
    (folder / "config.json").write_text(json.dumps(config).replace('"HERE"', text))
    return folder


def refused(folder: Path, *says: str) -> None:
    with pytest.raises(UserError) as error:
        load_judge(str(folder))
    assert "\n" not in str(error.value)
    for text in (folder.name, *says):
        assert text in str(error.value)


@pytest.mark.parametrize("threshold", BAD)
def test_a_threshold_that_no_probability_reaches_or_misses(toy: Path, threshold: str) -> None:
    refused(with_threshold(toy, threshold), "config.json")


@pytest.mark.parametrize("threshold", ["NaN", "Infinity", "-Infinity", "1e9", "-1e9", "1e999", "5.1", '"0"', "true"])
def test_a_threshold_that_no_cost_reaches_or_misses(cost: Path, threshold: str) -> None:
    refused(with_threshold(cost, threshold), "config.json")


@pytest.mark.parametrize(
    ("name", "value"),
    [("bias", -1e9), ("bias", 1e9), ("bias", float("nan")), ("temperature", 0.0), ("temperature", -1.0),
     ("temperature", float("inf")), ("temperature", 1e-20)],
)  # fmt: skip
def test_a_calibration_that_moves_all_costs_to_one_side(cost: Path, name: str, value: float) -> None:
    tensors = load_file(cost / "model.safetensors")
    save_file(tensors | {name: torch.tensor(value)}, cost / "model.safetensors")
    refused(cost, name)


def test_a_table_of_harms_that_lost_concepts(toy: Path) -> None:
    harm = json.loads((toy / "config.json").read_text())["harm"]
    refused(edited(toy, harm={k: v for k, v in harm.items() if k not in ("gun", "knife")}), "harm", "gun", "knife")


@pytest.mark.parametrize(
    ("values", "says"),
    [({"harm": {}}, "harm"), ({"harm": {"gun": "guns"}}, "guns"), ({"harm": {"gnu": "violence"}}, "gnu"),
     ({"harm": ["gun"]}, "harm"), ({"labels": []}, "labels"), ({"labels": ["gun", "gun"]}, "labels"),
     ({"labels": "gun"}, "labels"), ({"width": 10**9}, "width"), ({"width": 8.5}, "width")],
)  # fmt: skip
def test_settings_of_a_judge_that_cannot_be(toy: Path, values: dict[str, Any], says: str) -> None:
    refused(edited(toy, **values), says)


@pytest.mark.parametrize("key", ["threshold", "width"])
def test_settings_of_a_judge_that_are_missing(toy: Path, key: str) -> None:
    refused(edited(toy, **{key: None}), key)


def test_a_key_that_occurs_twice(toy: Path, cost: Path) -> None:
    for folder in (toy, cost):
        text = (folder / "config.json").read_text()
        (folder / "config.json").write_text(text.rstrip().removesuffix("}") + ', "threshold": 0.99}')
        refused(folder, "threshold")


def test_weights_that_are_no_numbers_are_refused_before_anything_is_drawn(toy: Path) -> None:
    tensors = load_file(toy / "model.safetensors")
    tensors["network.head.weight"].view(-1)[0] = float("nan")
    save_file(tensors, toy / "model.safetensors")
    refused(toy, "model.safetensors")


def test_weights_of_a_clip_that_are_no_numbers_or_missing(clip_folder: Path, tmp_path: Path) -> None:
    for damage in ("nan", "missing"):
        folder = shutil.copytree(clip_folder, tmp_path / damage)
        tensors = load_file(folder / "model.safetensors")
        name = "visual_projection.weight"
        if damage == "nan":
            tensors[name][0, 0] = float("nan")
        else:
            del tensors[name]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        refused(folder, name)


def test_a_network_that_answers_nan_on_an_image_makes_it_an_error(
    clip_folder: Path, tmp_path: Path, monkeypatch
) -> None:
    (tmp_path / "p.p").write_bytes(pickle.dumps(np.eye(2, 8, dtype=np.float32), protocol=2))
    for judge in (ZeroShotClip(str(clip_folder)), Q16(str(clip_folder), str(tmp_path / "p.p"))):
        monkeypatch.setattr(judge.clip, "images", lambda images: torch.full((len(images), 8), float("nan")))
        assert all(isinstance(answer, JudgeError) for answer in judge.judge([IMAGE, IMAGE]))


@pytest.mark.parametrize("threshold", [1.0, 2.0, float("nan"), float("inf"), 1e9, 0.0, -1.0])
def test_thresholds_of_the_other_judges(clip_folder: Path, tmp_path: Path, threshold: float) -> None:
    (tmp_path / "p.p").write_bytes(pickle.dumps(np.eye(2, 8, dtype=np.float32), protocol=2))
    with pytest.raises(UserError, match="threshold"):
        NudeNet(threshold=threshold, detector=object())
    with pytest.raises(UserError, match="threshold"):
        ZeroShotClip(str(clip_folder), threshold=threshold)
    with pytest.raises(UserError, match="threshold"):
        Q16(str(clip_folder), str(tmp_path / "p.p"), threshold=threshold)


@pytest.mark.parametrize("score", [1.5, -0.5, float("nan")])
def test_a_detection_whose_score_is_no_probability_is_an_error(score: float) -> None:
    class Strange:
        def detect(self, _: object) -> list[dict[str, Any]]:
            return [{"class": "FACE_MALE", "score": score}]

    (answer,) = NudeNet(detector=Strange()).judge([IMAGE])
    assert isinstance(answer, JudgeError)


def test_categories_of_the_zero_shot_judge_that_stand_twice_or_not_at_all(clip_folder: Path) -> None:
    for categories in ({}, {"Hate": ["a"], "hate": ["b"]}):
        with pytest.raises(UserError, match="categories"):
            ZeroShotClip(str(clip_folder), categories)


def test_a_model_that_says_harmful_twice_is_no_verdict() -> None:
    assert isinstance(read_object('{"harmful": true, "harmful": false}'), JudgeError)


@pytest.mark.parametrize("name", ["judge", "judge_b", "cost_model"])
def test_what_is_shipped_loads(name: str) -> None:
    assert load_judge(f"data/toyworld/{name}").settings["threshold"] in (0.0, 0.5)


def test_a_harm_of_another_category_or_another_spelling(toy: Path) -> None:
    """Figures by category would be wrong, and a label `Gun` that is in no table would count as harmless."""
    config = json.loads((toy / "config.json").read_text())
    refused(edited(toy, harm=config["harm"] | {"gun": "sexual"}), "gun", "sexual")
    labels = ["Gun" if name == "gun" else name for name in config["labels"]]
    refused(edited(toy, labels=labels, harm={k: v for k, v in config["harm"].items() if k != "gun"}), "Gun")


CALIBRATED = {"images": 8, "harmful": 4, "not_calibrated": None}


@pytest.mark.parametrize("threshold", [3.1, 4, -4])
def test_a_threshold_beyond_what_is_known_of_a_calibration(cost: Path, threshold: float) -> None:
    refused(edited(cost, threshold=threshold), "threshold")


def test_a_threshold_beyond_the_middle_of_its_calibration_images(cost: Path) -> None:
    """At 2 more than half of the harmful ones would be safe, at 1 fewer; below 0 likewise the safe ones."""
    middles = {"middle_harmful": 1.5, "middle_safe": -0.5}
    load_judge(str(edited(cost, threshold=1.0, calibration=CALIBRATED | middles)))
    refused(edited(cost, threshold=2.0), "threshold")
    refused(edited(cost, threshold=-1.0), "threshold")
    load_judge(str(edited(cost, threshold=0.0, calibration=CALIBRATED | {"middle_harmful": -0.3, "middle_safe": -2})))


@pytest.mark.parametrize(
    "calibration",
    [{"images": 4, "harmful": 4, "not_calibrated": "all 4 known labels were harmful"}, {}, [], "yes", 1, True,
     {"images": 4, "harmful": 2}, {"images": "4", "harmful": 2, "not_calibrated": None},
     CALIBRATED | {"middle_harmful": "high"}],
)  # fmt: skip
def test_a_cost_model_that_is_not_calibrated_judges_nothing(cost: Path, calibration: Any) -> None:
    """Of labels of one class, or of none, 0 is not a border: half of the harmful images could lie below it."""
    refused(edited(cost, calibration=calibration), "config.json", "calibrat")


@pytest.mark.parametrize("metrics", [[], "good", 1, {"auroc/hate": "0.9"}, {"auroc/hate": 10**400}])
def test_figures_of_a_cost_model_that_are_none(cost: Path, metrics: Any) -> None:
    """They say which categories it sees; without them it would be taken to see all."""
    refused(edited(cost, metrics=metrics), "config.json", "metrics")


@pytest.mark.parametrize("side", [-1, 0, 1, 8])
def test_images_shrunk_to_nothing(side: int) -> None:
    with pytest.raises(UserError, match="max_side"):
        VLM("http://localhost:1/v1", "model", max_side=side)
