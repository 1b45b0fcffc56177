"""Adapters in some blocks only: which layers, how far the backward pass goes, and the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from lit_safety.adapters import LoRA, load_lora
from lit_safety.backbones import load_backbone
from lit_safety.core.errors import UserError

UPPER = ["mid_block", "up_blocks"]


def adapted(pipeline: Path, blocks: list[str] | None) -> UNet2DConditionModel:
    unet = UNet2DConditionModel.from_pretrained(pipeline, subfolder="unet").requires_grad_(False)
    LoRA(rank=2, blocks=blocks).attach(unet, "policy")
    return unet


def prediction(unet: UNet2DConditionModel) -> torch.Tensor:
    width = unet.config.cross_attention_dim
    return unet(torch.ones(2, 4, 8, 8), torch.tensor([1, 1]), torch.ones(2, 16, width)).sample


def backward_flops(unet: UNet2DConditionModel) -> int:
    found = prediction(unet).sum()
    with FlopCounterMode(display=False) as counter:
        found.backward()
    return counter.get_total_flops()


def test_the_backward_pass_ends_at_the_first_adapter(tiny_pipeline: Path):
    everywhere, upper = adapted(tiny_pipeline, None), adapted(tiny_pipeline, UPPER)
    names = [name for name, p in upper.named_parameters() if p.requires_grad]
    assert names
    assert {name.split(".")[0] for name in names} == set(UPPER)
    needs: dict[str, bool] = {}
    for name in ("down_blocks", "mid_block"):
        found = upper.get_submodule(name)
        block = found[-1] if isinstance(found, torch.nn.ModuleList) else found
        block.register_forward_hook(
            lambda _, __, out, name=name: needs.update(
                {name: (out[0] if isinstance(out, tuple) else out).requires_grad}
            )
        )
    prediction(upper)
    assert needs == {"down_blocks": False, "mid_block": True}
    # The tiny network has one of its three attention layers below the middle.
    assert backward_flops(upper) < 0.9 * backward_flops(everywhere)


def test_stock_diffusers_reads_the_file(tiny_pipeline: Path, tmp_path: Path):
    backbone = load_backbone(str(tiny_pipeline))
    LoRA(rank=2, alpha=5, blocks=UPPER).attach(backbone.denoiser, "policy")
    torch.manual_seed(0)
    for parameter in backbone.denoiser.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.2)
    backbone.save_lora(tmp_path, "policy")
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline, safety_checker=None)
    load_lora(pipe, tmp_path)
    with torch.no_grad():
        found, expected = prediction(pipe.unet), prediction(backbone.denoiser)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_blocks_that_are_not_there_are_refused(tiny_pipeline: Path):
    with pytest.raises(UserError, match=r"match 0 layers of UNet2DConditionModel within `lora.blocks` \['middle'\]"):
        adapted(tiny_pipeline, ["middle"])
