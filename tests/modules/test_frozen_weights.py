"""Frozen weights in bfloat16 next to the same network with weights in fp32, both in autocast."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_safety.adapters.lora import LoRA
from lit_safety.backbones.lowered import lower_frozen
from lit_safety.core.errors import UserError
from lit_safety.modules import SCDPO, PreferenceModule
from lit_safety.objectives import DiffusionDPO
from tests.helpers.batches import batch_of

FAMILIES = ("tiny_pipeline", "tiny_sdxl", "tiny_sd3")


def module_of(pipeline: Path, lower: bool) -> PreferenceModule:
    """With a policy that has moved, so that every weight has a gradient."""
    torch.manual_seed(0)
    module = PreferenceModule(str(pipeline), DiffusionDPO(100.0, sft_weight=1.0), LoRA(4)).train()
    module.configure_model()
    for _, parameter in module.trainable_parameters():
        torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(parameter.numel()))
    if lower:
        lower_frozen(module.backbone.denoiser, torch.bfloat16)
    return module


def step(module: PreferenceModule) -> tuple[torch.Tensor, list[torch.Tensor]]:
    batch = batch_of([0, 1, 2])
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        loss = module.loss(module.errors(batch), batch).loss
    return loss.detach(), list(torch.autograd.grad(loss.sum(), [p for _, p in module.trainable_parameters()]))


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_the_same_bits(family: str, request: pytest.FixtureRequest):
    pipeline = request.getfixturevalue(family)
    whole, half = module_of(pipeline, lower=False), module_of(pipeline, lower=True)
    (loss, gradients), (same, also) = step(whole), step(half)
    assert torch.equal(loss, same)
    names = [name for name, _ in whole.trainable_parameters()]
    idle = [name for name, gradient in zip(names, gradients, strict=True) if not gradient.abs().max() > 0]
    # In SD3's last block nothing reads what the text asks: its queries are adapted and learn nothing.
    assert all("add_q_proj" in name for name in idle)
    assert len(idle) <= 2
    assert all(torch.equal(one, other) for one, other in zip(gradients, also, strict=True))
    sizes = [
        sum(p.numel() * p.element_size() for p in module.backbone.denoiser.parameters() if not p.requires_grad)
        for module in (whole, half)
    ]
    assert sizes[1] < 0.55 * sizes[0]
    assert all(p.dtype == torch.float32 for _, p in half.trainable_parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_whoever_is_outside_of_a_step_draws_all_the_same(family: str, request: pytest.FixtureRequest):
    """Two steps of sampling, in which bfloat16's 8 bits move a pixel by a few of 255."""
    pipeline = request.getfixturevalue(family)
    drawn = []
    for lower in (False, True):
        module = module_of(pipeline, lower)
        module.drawing.steps = 2
        with torch.no_grad():
            (image,) = module.draw(["a red cat"], [0])
        drawn.append(np.asarray(image, dtype=np.float32))
    assert drawn[0].std() > 1
    assert np.abs(drawn[0] - drawn[1]).max() < 8


def test_a_pass_without_gradient_takes_nothing_from_the_next(tiny_pipeline: Path):
    """A cast that is kept from the first pass would have no history."""
    module, batch = module_of(tiny_pipeline, lower=True), batch_of([0])
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        with torch.no_grad():
            module.errors(batch)
        loss = module.loss(module.errors(batch), batch).loss.sum()
    found = torch.autograd.grad(loss, [p for _, p in module.trainable_parameters()], allow_unused=True)
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in found)


def test_the_copy_of_a_full_fine_tune_is_lowered_and_agrees_exactly_at_the_start(tiny_pipeline: Path):
    module = SCDPO(str(tiny_pipeline), DiffusionDPO(100.0, anchor_weight=1.0), policy="full")
    module.configure_model()
    policy, copy = module.networks()
    for network in (policy, copy):
        lower_frozen(network, torch.bfloat16)
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert {p.dtype for p in copy.parameters()} == {torch.bfloat16, torch.float32}
    batch = batch_of([0, 1])
    logs = module.loss(module.errors(batch), batch).logs
    assert (logs["rewards/margins"] == 0).all()
    assert (logs["loss/anchor"] == 0).all()


def test_a_deep_copy_computes_with_its_own_weights(tiny_pipeline: Path):
    """As a reference that somebody keeps next to the policy must."""
    denoiser = module_of(tiny_pipeline, lower=True).backbone.denoiser
    other = copy.deepcopy(denoiser)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if ".lora_B." in name:
                parameter.add_(1.0)
        inputs = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 16, 32)
        before = denoiser(*inputs).sample
        assert not torch.equal(other(*inputs).sample, before)


def test_what_was_lowered_is_not_trained(tiny_pipeline: Path):
    module = module_of(tiny_pipeline, lower=True)
    module.configure_optimizers()
    module.backbone.denoiser.get_submodule("conv_out").requires_grad_(True)
    with pytest.raises(UserError, match=r"conv_out.weight .*`configure_policy`"):
        module.configure_optimizers()
