"""Arms that differ in their LoRA alone share one loaded pipeline, and draw the same bits as with one of their own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_safety.core.errors import UserError
from lit_safety.drawing.arms import Arm
from lit_safety.drawing.gallery import DrawingSettings, draw_batch
from lit_safety.drawing.pipelines import Pipelines, load_pipeline
from tests.fixtures.evaluation import save_adapter

SETTINGS = DrawingSettings(steps=2, device="cpu")


def test_arms_draw_what_they_draw_alone(pipeline: Path, adapter: Path, small_set) -> None:
    """Base, LoRA, the same at half strength, opposite, base again with a negative prompt: one load, the same bits."""
    lora = Arm(str(adapter))
    arms = [Arm(), lora, replace(lora, scale=0.5), replace(lora, scale=-1.0), Arm(negative_prompt="gun"), lora, Arm()]
    shared = Pipelines()
    for arm in arms:
        pipe = shared.load(pipeline, arm, "cpu", "float32")
        found = draw_batch(pipe, small_set[:2], SETTINGS, arm.negative_prompt)
        own = load_pipeline(pipeline, arm)
        assert np.array_equal(found, draw_batch(own, small_set[:2], SETTINGS, arm.negative_prompt))
    assert shared.loaded == 1
    shared.release()
    shared.load(pipeline, Arm(), "cpu", "float32")
    assert shared.loaded == 2


def test_a_lora_that_is_not_fused_leaves_nothing(pipeline: Path, adapter: Path) -> None:
    """Below float32 LoRAs stay beside the weights."""
    shared = Pipelines()
    before = {k: v.clone() for k, v in shared.load(pipeline, Arm(), "cpu", "bfloat16").unet.state_dict().items()}
    adapted = shared.load(pipeline, Arm(str(adapter)), "cpu", "bfloat16").unet
    assert len(adapted.state_dict()) > len(before)
    after = shared.load(pipeline, Arm(), "cpu", "bfloat16").unet.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert shared.loaded == 1


def test_another_pipeline_or_precision_is_loaded_and_the_last_one_forgotten(pipeline: Path, tmp_path: Path) -> None:
    import shutil

    other = Path(shutil.copytree(pipeline, tmp_path / "other"))
    shared = Pipelines()
    first = shared.load(pipeline, Arm(), "cpu", "float32")
    assert shared.load(pipeline, Arm(), "cpu", "float32") is first
    assert shared.load(other, Arm(), "cpu", "float32") is not first
    assert shared.load(other, Arm(), "cpu", "bfloat16").unet.dtype is torch.bfloat16
    assert shared.loaded == 3


def test_after_an_adapter_that_does_not_load_the_pipeline_is_loaded_again(
    pipeline: Path, adapter: Path, other_adapter: Path, small_set
) -> None:
    shared = Pipelines()
    base = draw_batch(shared.load(pipeline, Arm(), "cpu", "float32"), small_set[:2], SETTINGS)
    with pytest.raises(UserError):
        shared.load(pipeline, Arm(adapters={str(adapter): 1.0, str(other_adapter): 1.0}), "cpu", "float32")
    again = draw_batch(shared.load(pipeline, Arm(), "cpu", "float32"), small_set[:2], SETTINGS)
    assert np.array_equal(base, again)
    assert shared.loaded == 2


def test_a_lora_of_a_text_encoder_is_taken_out_too(pipeline: Path, tmp_path: Path, small_set) -> None:
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = StableDiffusionPipeline.from_pretrained(pipeline, safety_checker=None)
    torch.manual_seed(2)
    pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    layers = get_peft_model_state_dict(pipe.text_encoder)
    StableDiffusionPipeline.save_lora_weights(tmp_path / "text", text_encoder_lora_layers=layers)
    assert save_adapter(pipeline, tmp_path / "image").is_dir()
    shared = Pipelines()
    drawn = []
    for arm in (Arm(), Arm(str(tmp_path / "text")), Arm(str(tmp_path / "image")), Arm()):
        drawn.append(draw_batch(shared.load(pipeline, arm, "cpu", "float32"), small_set[:2], SETTINGS))
        own = load_pipeline(pipeline, arm)
        assert np.array_equal(drawn[-1], draw_batch(own, small_set[:2], SETTINGS))
    assert np.array_equal(drawn[0], drawn[3])
    assert not np.array_equal(drawn[0], drawn[1])
    assert shared.loaded == 1
