"""Attacks and drawings of commands on the families of rectified flow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lit_safety.adapters.lora import LoRA
from lit_safety.attacks.lora_training import TrainingImage, train_lora
from lit_safety.attacks.network import open_network
from lit_safety.attacks.soft_prompt import SoftPrompt
from lit_safety.attacks.target import Target
from lit_safety.backbones.call import call_options
from lit_safety.core.errors import UserError
from lit_safety.drawing.arms import Arm
from lit_safety.drawing.gallery import DrawingSettings, draw_batch
from lit_safety.drawing.pipelines import Painter, PainterSettings
from lit_safety.drawing.prompts import Prompt
from tests.helpers.flow_pipelines import FAMILIES, save_flow

DRAWING = DrawingSettings(steps=2, guidance=3.0, batch_size=2, device="cpu", resolution=32)


def row(text: str) -> Prompt:
    return Prompt(text, "explicit", "violence", "", (), False, 1)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_fine_tune_attacks_and_commands_draw(family: str, tmp_path: Path):
    folder = save_flow(family, tmp_path / family)
    network = open_network(folder, Arm(), "cpu", 32)
    side = open_network(folder, Arm(), "cpu").resolution
    assert side == (32 if family == "sana" else 256)  # 128 latents of 2 pixels; SANA's configuration says 16
    before = draw_batch(network.pipe, [row("a gun"), row("a cat")], DRAWING)
    images = [TrainingImage(str(n), "a gun", "gun", Image.new("RGB", (32, 32), (9 * n, 40, 80))) for n in range(4)]
    for step, loss in train_lora(network, images, LoRA(rank=2), "attack", 1e-1, 2, seed=0):
        assert np.isfinite(loss)
        if step == 3:
            break
    after = draw_batch(network.pipe, [row("a gun"), row("a cat")], DRAWING)
    assert before.shape == after.shape == (2, 32, 32, 3)
    assert np.abs(after - before).max() > 1e-3
    painted = Painter(network.pipe, PainterSettings(steps=2, guidance=3.0, resolution=32), False).from_text(["a"], [1])
    assert painted[0] is not None
    assert painted[0].size == (32, 32)


@pytest.mark.parametrize("family", ["qwen_image", "z_image"])
def test_an_image_is_redrawn_at_its_own_size(family: str, tmp_path: Path):
    """Where diffusers redraws with negative prompts; Qwen-Image's pipeline would draw at its own size."""
    pipe = FAMILIES[family](tmp_path / "words")
    pipe.set_progress_bar_config(disable=True)
    painter = Painter(pipe, PainterSettings(steps=2, guidance=3.0, resolution=32), True)
    images = [Image.new("RGB", (32, 32), (90 * n, 40, 80)) for n in range(2)]
    drawn = painter.from_images(images, ["a cat", "a house"], ["a gun", "a gun"], 0.5, [1, 2])
    assert [one.size for one in drawn if one is not None] == [(32, 32)] * 2


def test_guidance_and_negative_prompts_are_given_as_each_pipeline_takes_them(tmp_path: Path):
    """Scales as of Stable Diffusion: 1 is none, Z-Image counts from 0, Qwen-Image needs a negative prompt at all."""
    names = ("qwen_image", "z_image", "sana", "flux", "klein")
    pipes = {name: FAMILIES[name](tmp_path / name) for name in names}
    assert call_options(pipes["z_image"], 5.0) == {"guidance_scale": 4.0}
    assert call_options(pipes["z_image"], 1.0) == {"guidance_scale": 0.0}
    assert call_options(pipes["qwen_image"], 4.0, count=2) == {"true_cfg_scale": 4.0, "negative_prompt": [" ", " "]}
    assert call_options(pipes["qwen_image"], 1.0) == {"true_cfg_scale": 1.0}
    assert call_options(pipes["sana"], 4.5)["use_resolution_binning"] is False
    assert call_options(pipes["klein"], 4.0) == {"guidance_scale": 4.0}
    assert call_options(pipes["z_image"], 3.0, ["blood"])["negative_prompt"] == ["blood"]
    for name in ("flux", "klein"):
        with pytest.raises(UserError, match="negative"):
            call_options(pipes[name], 3.0, ["blood"])


def test_an_attack_on_the_tokens_of_clip_is_refused_by_name(tmp_path: Path):
    folder = save_flow("z_image", tmp_path / "pipe")
    target = Target("arm", Arm(), folder, folder, [row("a gun")], [row("a gun")], DRAWING, 0, tmp_path / "work")
    reason = SoftPrompt("shards").refuses(target)
    assert reason is not None
    assert "ZImagePipeline" in reason


def test_a_text_of_one_prompt_is_not_templated_twice(tmp_path: Path):
    """Z-Image's call writes into the list of prompts that it is given."""
    folder = save_flow("z_image", tmp_path / "pipe")
    pipe = open_network(folder, Arm(), "cpu", 32).pipe
    prompts = [row("a gun")]
    one, two = (draw_batch(pipe, prompts, DRAWING) for _ in range(2))
    assert torch.equal(torch.as_tensor(one), torch.as_tensor(two))
