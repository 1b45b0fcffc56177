"""What was found on one arm is drawn by another one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lit_safety.attacks import AdapterScale, Attack, FineTune, NoiseInversion, SoftPrompt, Transfer
from lit_safety.drawing.arms import Arm
from lit_safety.drawing.gallery import draw_batch


@pytest.fixture
def arms(make_target, tiny_adapter: Path):
    """The arm `other` under attack, and `found`, which the attack is done against: the same with an adapter."""
    source = make_target(Arm(adapter=str(tiny_adapter)))
    source.name = "found"
    return replace(make_target(), name="other", other=lambda name: {"found": source}[name]), source


@pytest.mark.parametrize("kind", ["soft prompt", "noise"])
def test_words_and_noise_of_one_arm_are_drawn_by_the_weights_of_the_other(kind: str, arms, category_shards: Path):
    target, source = arms
    shards = str(category_shards)
    attacks: dict[str, Attack] = {
        "soft prompt": SoftPrompt(shards, steps=[1, 2], pictures=2, batch_size=1),
        "noise": NoiseInversion(shards, passes=[1]),
    }
    attack = attacks[kind]
    transfer = Transfer(attack, "found")
    assert transfer.refuses(target) is None
    assert transfer.sources == ("found",)
    direct, moved = list(attack.stages(source)), list(transfer.stages(target))
    assert [stage.budget for stage in direct] == [stage.budget for stage in moved]
    one, other = direct[-1], moved[-1]
    assert [p.prompt for p in one.prompts] == [p.prompt for p in other.prompts]
    assert other.identity["transferred"]
    source_unet, target_unet = (one.pipe.unet.state_dict(), other.pipe.unet.state_dict())
    assert any((source_unet[name] != target_unet[name]).any() for name in target_unet)
    base = target.base_network().backbone.denoiser.state_dict()
    assert all((base[name] == tensor).all() for name, tensor in target_unet.items())
    text = [p.prompt for p in one.prompts]
    said = [pipe.encode_prompt(text, "cpu", 1, False)[0] for pipe in (one.pipe, other.pipe)]
    assert (said[0] == said[1]).all()  # the tokens went along
    drawn = [draw_batch(stage.pipe, stage.prompts, stage.drawing) for stage in (one, other)]
    assert np.abs(drawn[0] - drawn[1]).max() > 0


def test_what_cannot_be_transferred_is_said(arms, category_shards: Path):
    target, source = arms
    assert Transfer(AdapterScale([0.0]), "found").refuses(source)
    assert "finds weights" in str(Transfer(FineTune(str(category_shards)), "found").refuses(target))
