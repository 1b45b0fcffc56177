from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lit_safety.attacks import StartImage
from lit_safety.backbones.diffusion import UNetDiffusion
from lit_safety.core.errors import UserError
from lit_safety.drawing.arms import Arm
from lit_safety.drawing.edits import GivenImages
from lit_safety.drawing.gallery import draw_batch
from lit_safety.drawing.guards.safe_latent_diffusion import SafeLatentDiffusion
from tests.attacks.conftest import DRAWING


def test_the_loss_falls_and_each_prompt_starts_from_an_image_of_its_own(
    make_target, category_shards: Path, monkeypatch
) -> None:
    """The random autoencoder's latents are made as large as real ones, or noise would hide all that is found."""
    plain = UNetDiffusion.latents
    monkeypatch.setattr(UNetDiffusion, "latents", lambda self, *given: 10 * plain(self, *given))
    target = make_target(drawing=replace(DRAWING, steps=4))
    told: list[float] = []
    target.tell = lambda text: told.append(float(text.rsplit(" ", 1)[1]))
    attack = StartImage(str(category_shards), steps=[1, 30], strength=0.3, reference=0.0, lr=0.05)
    stages = [(stage, stage.drawing.edit.inputs(None, stage.prompts, None)) for stage in attack.stages(target)]
    assert [stage.budget for stage, _ in stages] == [0, 1, 30]
    assert np.mean(told[-5:]) < 0.8 * np.mean(told[:5])
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
