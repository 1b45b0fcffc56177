"""Where judges and scorers compute, and what their settings say of it. Half precision is tried on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from lit_safety.core.errors import UserError
from lit_safety.judges.clip import Clip, ZeroShotClip
from lit_safety.judges.fid import extract
from lit_safety.judges.judge import JudgeError, Verdict, figure_settings, rule_settings, verdict_settings
from lit_safety.judges.judging import judge_safely
from lit_safety.judges.placing import Place, place
from lit_safety.judges.q16 import Q16
from lit_safety.judges.scorers import ClipPreference
from lit_safety.judges.toy.judge import ToyJudge, ToyWorldJudge
from lit_safety.judges.union import Union

HALF = Place("cpu", "bfloat16")


def pictures(count: int, side: int = 32) -> list[Image.Image]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (count, side, side, 3), generator=generator, dtype=torch.uint8)
    return [Image.fromarray(one.numpy()) for one in pixels]


@pytest.fixture
def toy(tmp_path: Path) -> ToyWorldJudge:
    torch.manual_seed(0)
    harm = {"knife": "violence", "skull": "shocking"}
    ToyJudge(labels=["knife", "skull", "car"], harm=harm, width=8).save_pretrained(tmp_path / "judge")
    return ToyWorldJudge(tmp_path / "judge")


def test_half_precision_is_for_gpus_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Place.of("cpu") == Place.of(None) == Place("cpu", "float32")
    assert Place.of("cuda:1") == Place("cuda:1", "float16")
    assert Place.of("cuda", "float32") == Place("cuda", "float32")
    assert Place.of("cpu", "bfloat16") == HALF
    with pytest.raises(UserError, match=r"--judge_precision: float16.*needs a GPU"):
        Place.of("cpu", "float16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert Place.of(None).device == "cuda"


def test_on_the_cpu_in_float32_nothing_changes(toy: ToyWorldJudge, clip_folder: Path) -> None:
    before = toy.judge(pictures(5)), Clip(str(clip_folder), "x").images(pictures(5))
    clip = Clip(str(clip_folder), "x")
    for one in (toy, clip):
        place(one, Place())
        assert one.settings["precision"] == "float32"
    assert toy.judge(pictures(5)) == before[0]
    assert torch.equal(clip.images(pictures(5)), before[1])


def test_half_precision_is_near_and_said(toy: ToyWorldJudge, clip_folder: Path, tmp_path: Path) -> None:
    """bfloat16 keeps 8 bits: probabilities of the small network move by some thousandths, cosines by a hundredth."""
    np.save(tmp_path / "p.npy", Clip(str(clip_folder), "x").images(pictures(2)).numpy())
    judges = [toy, ZeroShotClip(str(clip_folder)), Q16(str(clip_folder), str(tmp_path / "p.npy"))]
    for judge in judges:
        whole = judge.judge(pictures(4))
        place(judge, HALF)
        half = judge.judge(pictures(4))
        assert judge.settings["precision"] == "bfloat16"
        assert half != whole
        for one, other in zip(half, whole, strict=True):
            assert isinstance(one, Verdict)
            assert isinstance(other, Verdict)
            if judge is toy:
                assert one.scores == pytest.approx(other.scores, abs=0.02)
    clip, near = Clip(str(clip_folder), "x"), Clip(str(clip_folder), "x")
    place(near, HALF)
    assert near.images(pictures(4)).dtype is torch.float32
    torch.testing.assert_close(near.images(pictures(4)), clip.images(pictures(4)), atol=0.05, rtol=0)
    place(near, Place())
    assert torch.equal(near.images(pictures(4)), clip.images(pictures(4)))


def test_inputs_follow_the_network(toy: ToyWorldJudge) -> None:
    """The `meta` device has no numbers: the network gets its input there, and what it cannot answer is an error."""
    place(toy, Place("meta"))
    seen = []
    toy.network.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].device.type))
    answers = judge_safely(toy, pictures(2))
    assert set(seen) == {"meta"}
    assert all(isinstance(answer, JudgeError) for answer in answers)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:7", "gpu"])
def test_a_device_that_is_not_there_is_one_line(device: str, toy: ToyWorldJudge) -> None:
    with pytest.raises(UserError, match=rf"--device {device}: a ToyJudge, which measures, cannot be moved there"):
        place(toy, Place.of(device))
    assert toy.where == Place()


def test_members_are_placed_and_a_device_that_was_given_stays(
    toy: ToyWorldJudge, clip_folder: Path, tmp_path: Path
) -> None:
    np.save(tmp_path / "p.npy", Clip(str(clip_folder), "x").images(pictures(2)).numpy())
    stays = Q16(str(clip_folder), str(tmp_path / "p.npy"), device="cpu")
    both = Union([toy, stays])
    place(both, HALF)
    assert [one["precision"] for one in both.settings["members"]] == ["bfloat16", "float32"]
    assert "precision" not in both.settings
    scorer = ClipPreference(str(clip_folder))
    place(scorer, HALF)
    assert scorer.settings["precision"] == "bfloat16"
    unmoved = object()
    place(unmoved, HALF)  # a judge of somebody's own, without networks


def test_figures_of_two_number_formats_are_compared_and_stored_verdicts_are_not(toy: ToyWorldJudge) -> None:
    """float32 is what reports and journals of before it was noted are of."""
    before = dict(toy.settings)
    settings = {one: {**before, "precision": one} for one in ("float32", "float16")}
    assert verdict_settings(settings["float32"]) == verdict_settings(before)
    assert verdict_settings(settings["float16"]) != verdict_settings(before)
    for function in (figure_settings, rule_settings):
        assert function(settings["float32"]) == function(settings["float16"]) == function(before)
        union = [{"members": [one]} for one in (before, settings["float16"])]
        assert function(union[0]) == function(union[1])


def test_features_are_computed_where_the_weights_are_and_in_the_format_asked_for() -> None:
    class Network(nn.Module):
        num_features = 4

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(12, 4)
            self.types: list[torch.dtype] = []

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            found = self.layer(images.float().flatten(1) / 255)
            self.types.append(found.dtype)
            return found

    network = Network()
    named = [(str(number), one) for number, one in enumerate(pictures(3, side=2))]
    whole, half = extract(network, named), extract(network, named, HALF)
    assert network.types == [torch.float32, torch.bfloat16]
    assert whole.dtype is half.dtype is torch.float64
    torch.testing.assert_close(half, whole, atol=0.02, rtol=0)
    assert not torch.equal(half, whole)


def test_a_cost_model_in_half_precision_is_near(toyworld_cost_model: Path) -> None:
    from lit_safety.judges.cost import CostJudge

    judge = CostJudge(toyworld_cost_model)
    whole = judge.scorer.costs(pictures(3))
    place(judge, HALF)
    half = judge.scorer.costs(pictures(3))
    assert half.dtype is torch.float32
    assert not torch.equal(half, whole)
    torch.testing.assert_close(half, whole, atol=0.3, rtol=0.1)
    place(judge, Place())
    assert torch.equal(judge.scorer.costs(pictures(3)), whole)


@pytest.fixture
def toyworld_cost_model() -> Path:
    return Path(__file__).parents[2] / "data" / "toyworld" / "cost_model"
