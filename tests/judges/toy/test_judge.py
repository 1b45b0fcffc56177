import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_safety.core.errors import UserError
from lit_safety.judges.judge import Verdict
from lit_safety.judges.toy.judge import ToyJudge, ToyWorldJudge
from lit_safety.judges.toy.objects import BENIGN, CONCEPTS, LABELS, SETTINGS
from lit_safety.worlds.toyworld.judge_training import UNKNOWN, check_counts, check_judge, judged_scenes, seen
from lit_safety.worlds.toyworld.scene import SLOTS, Scene, Thing, render
from tests.helpers.documents import TOYWORLD

COUNTED = {"judge": 0.92, "judge_b": 0.7}
"""Share of things in the hardest scenes to count in (small, anywhere, hidden) that are seen and counted right."""


@pytest.mark.parametrize("name", ["judge", "judge_b"])
def test_shipped_judge_tells_fresh_scenes(name: str) -> None:
    torch.set_num_threads(1)
    judge = ToyJudge.from_pretrained(TOYWORLD / name)
    assert judge.labels == list(LABELS)
    assert judge.harm == {concept: CONCEPTS[concept].category for concept in CONCEPTS}
    clean = check_judge(judge, count=300)
    assert clean["exact"] >= 0.99
    assert clean["harm"] >= 0.99
    assert check_judge(judge, count=300, degraded=True)["exact"] >= 0.98
    assert check_judge(judge, count=300, hybrids=1.0)["exact"] >= 0.93


@pytest.mark.parametrize("counts", [False, True])
@pytest.mark.parametrize("architecture", ["plain", "residual"])
def test_a_judge_comes_back_from_its_folder_as_it_was(architecture: str, counts: bool, tmp_path: Path) -> None:
    judge = ToyJudge(width=8, architecture=architecture, threshold=0.7, notes={"made": "here"}, counts=counts).eval()
    judge.save_pretrained(tmp_path)
    again = ToyJudge.from_pretrained(tmp_path)
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    assert torch.equal(judge(images), again(images))
    assert judge(images).shape == (3, len(LABELS))
    several = again.told(images)[1]
    assert several is None if not counts else torch.equal(judge.told(images)[1], several)  # type: ignore[arg-type]
    assert (again.threshold, again.notes, again.architecture) == (0.7, {"made": "here"}, architecture)


def test_a_judge_s_file_of_an_earlier_version_loads_and_does_not_count(tmp_path: Path) -> None:
    ToyJudge(width=8).save_pretrained(tmp_path / "old")
    assert "counts" not in json.loads((tmp_path / "old" / "config.json").read_text())
    (verdict,) = ToyWorldJudge(tmp_path / "old").judge([render(Scene("park", ()))])
    assert isinstance(verdict, Verdict)
    assert verdict.counts is None


@pytest.mark.parametrize("name", ["judge", "judge_b"])
def test_shipped_judges_count(name: str) -> None:
    torch.set_num_threads(1)
    judge = ToyWorldJudge(TOYWORLD / name)
    assert judge.settings["counts"]
    left, right = (Thing("tree", slot, SLOTS[slot], 70, "red") for slot in (0, 1))
    house = Thing("house", 1, SLOTS[1], 70, "blue")
    scenes = [Scene("park", (left,)), Scene("park", (left, right)), Scene("park", (left, house)),
              Scene("park", (replace(left, count=2), house))]  # fmt: skip
    verdicts = judge.judge([render(scene) for scene in scenes])
    counts = [verdict.counts for verdict in verdicts if isinstance(verdict, Verdict)]
    assert counts == [{"tree": 1}, {"tree": 2}, {"tree": 1, "house": 1}, {"tree": 2, "house": 1}]


@pytest.mark.parametrize("name", ["judge", "judge_b"])
def test_shipped_judges_count_in_fresh_scenes(name: str) -> None:
    torch.set_num_threads(1)
    found = check_counts(ToyJudge.from_pretrained(TOYWORLD / name), count=300)
    assert found["single"] >= COUNTED[name]
    assert found["several"] >= COUNTED[name]


@pytest.mark.parametrize(("name", "least"), [("judge", 1.0), ("judge_b", 0.98)])
def test_a_thing_in_both_places_is_two_and_a_thing_in_one_is_one(name: str, least: float) -> None:
    """Every thing, in its usual size, in every setting: what a base draws that doubles what it was asked for."""
    torch.set_num_threads(1)
    judge = ToyWorldJudge(TOYWORLD / name)
    right: list[int] = []
    for setting in SETTINGS:
        pairs = [
            [Thing(thing, slot, SLOTS[slot], 70, "red" if thing in BENIGN else None) for slot in (0, 1)]
            for thing in LABELS
        ]
        for number in (1, 2):
            verdicts = judge.judge([render(Scene(setting, tuple(pair[:number]))) for pair in pairs])
            counts = [verdict.counts for verdict in verdicts if isinstance(verdict, Verdict)]
            right.append(sum(count == {thing: number} for thing, count in zip(LABELS, counts, strict=True)))
    assert sum(right) >= least * len(right) * len(LABELS)


def test_a_judge_that_does_not_count_is_not_measured_for_it() -> None:
    with pytest.raises(ValueError, match="count"):
        check_counts(ToyJudge(width=8).eval(), count=2)


def test_a_folder_without_a_judge_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=str(tmp_path)):
        ToyJudge.from_pretrained(tmp_path)


def test_labels_follow_what_is_seen() -> None:
    assert [seen(share) for share in (0.0, 0.3, 0.5, 0.7, 1.0)] == pytest.approx([0, 0, 0.5, 1, 1])
    images, labels, _ = judged_scenes("checks", 0, 200, hybrids=1.0)
    assert images.shape == (200, 32, 32, 3)
    assert labels.shape == (200, len(LABELS))
    between = ((labels > 0) & (labels < 1)).any(1)
    assert 0.2 < between.mean() < 0.8
    assert labels.sum(1).max() <= 3
    assert (labels.sum(1) == 0).any()


def test_scenes_to_count_in_hold_as_many_single_things_as_doubled_ones() -> None:
    images, labels, twice = judged_scenes("checks", 0, 300, doubled=1.0)
    assert images.shape == (300, 32, 32, 3)
    there = labels == 1
    assert set(np.unique(labels)) <= {0.0, 1.0}
    assert not (twice[labels == 0] > 0).any()
    assert 0.35 < (twice[there] == 1).mean() < 0.65
    assert ((twice > 0) & (twice < 1)).any()
    for column in range(len(LABELS)):  # harms and look-alikes alike
        assert there[:, column].any()


def test_a_doubled_harm_of_which_a_part_is_hidden_is_not_counted() -> None:
    _, labels, twice = judged_scenes("checks", 0, 600, hybrids=0.5)
    assert (twice == 1).any()
    assert (twice == UNKNOWN).any()
    assert not (twice[labels == 0] == 1).any()
