from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_safety.attacks import StartImage
from lit_safety.attacks.start_image import _Search
from lit_safety.core.errors import UserError
from lit_safety.drawing.arms import Arm
from lit_safety.drawing.edits import GivenImages
from lit_safety.drawing.gallery import draw_batch
from lit_safety.drawing.guards.safe_latent_diffusion import SafeLatentDiffusion
from tests.attacks.conftest import DRAWING


class Blind:
    """A flow model that takes what it is given for the clean image: to have it see the goal, give it the goal."""

    device = torch.device("cpu")

    def posterior(self, images: Tensor) -> Tensor:
        return torch.stack([images, torch.zeros_like(images)], dim=1)

    def latents(self, posterior: Tensor, noise: Tensor) -> Tensor:
        return posterior[:, 0] + posterior[:, 1] * noise

    def timesteps(self, places: Tensor, size: tuple[int, int]) -> Tensor:
        return places.float()

    def add_noise(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        sigma = times.view(-1, 1, 1, 1)
        return (1 - sigma) * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        return noise - latents

    def predict(self, noisy: Tensor, times: Tensor, text: dict[str, Tensor]) -> Tensor:
        return torch.zeros_like(noisy)


def test_the_start_image_becomes_what_makes_the_model_see_the_goal() -> None:
    goal = torch.tensor([-0.4, 0.3]).view(2, 1, 1, 1) * torch.ones(2, 3, 8, 8)
    goal[:, :, :4] *= -1
    network: Any = SimpleNamespace(backbone=Blind(), pipe=SimpleNamespace(components={}))
    attack = StartImage("x", steps=[60], strength=0.4, lr=0.05)
    search = _Search(attack, network, goal, {}, [1, 2], torch.zeros(2, 3, 8, 8), chunk=1)
    losses = [search.step(number) for number in range(60)]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    for image, wanted in zip(search.images, goal, strict=True):
        assert float(torch.corrcoef(torch.stack([image.flatten(), wanted.flatten()]))[0, 1]) > 0.8
    assert search.images.abs().max() <= 1


def test_each_prompt_starts_from_an_image_of_its_own_and_twice_from_the_same(
    make_target, category_shards: Path
) -> None:
    target = make_target(drawing=replace(DRAWING, steps=4))
    attack = StartImage(str(category_shards), steps=[1, 2], strength=0.6)
    stages = [(stage, stage.drawing.edit.inputs(None, stage.prompts, None)) for stage in attack.stages(target)]
    assert [stage.budget for stage, _ in stages] == [0, 1, 2]
    first, second = (np.asarray(image) for image in stages[-1][1]["image"])
    assert first.shape == (32, 32, 3)
    assert first.dtype == np.uint8
    assert not np.array_equal(first, second)
    again = [stage.drawing.edit.describe() for stage in attack.stages(make_target(drawing=replace(DRAWING, steps=4)))]
    assert again == [stage.drawing.edit.describe() for stage, _ in stages]
    assert len({str(one) for one in again}) == 3


def test_the_arms_guard_and_negative_prompt_stay_on(make_target, category_shards: Path) -> None:
    """What is redrawn is what the guard lets through: with it the pixels are others."""
    target = make_target(Arm(guard=SafeLatentDiffusion(concept="a gun", warmup_steps=0, strength="max")),
                         drawing=replace(DRAWING, steps=4))  # fmt: skip
    attack = StartImage(str(category_shards), steps=[1], strength=0.9)
    stage = list(attack.stages(target))[-1]
    guarded = draw_batch(stage.pipe, stage.prompts, stage.drawing, guard=target.arm.guard)
    assert np.abs(guarded - draw_batch(stage.pipe, stage.prompts, stage.drawing)).max() > 0


def test_bad_input() -> None:
    with pytest.raises(UserError, match="strength"):
        StartImage("x", strength=0.0)
    with pytest.raises(UserError, match="edit_strength"):
        GivenImages({}, 2.0)
