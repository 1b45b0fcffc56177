"""How a step is computed: compiled blocks, checkpointing, optimizers, and nothing that waits for the device."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lit_safety.adapters.lora import LoRA
from lit_safety.core.errors import UserError
from lit_safety.data.reading.batch import PairBatch
from lit_safety.modules import PreferenceModule
from lit_safety.modules.speed import Speed
from lit_safety.objectives import DiffusionDPO, Objective
from tests.helpers.batches import batch_of


def module_of(pipeline: Path, objective: Objective | None = None, **options) -> PreferenceModule:
    torch.manual_seed(0)
    module = PreferenceModule(str(pipeline), objective or DiffusionDPO(100.0), LoRA(4), speed=Speed(**options))
    module.configure_model()
    return module.train()


def gradients(module: PreferenceModule, batch: PairBatch) -> list[torch.Tensor]:
    loss = module.loss(module.errors(batch), batch).loss.mean()
    return list(torch.autograd.grad(loss, [p for _, p in module.trainable_parameters()]))


def cached(batch: PairBatch) -> PairBatch:
    """Latents and text as a cache gives them."""
    size = len(batch)
    generator = torch.Generator().manual_seed(0)
    batch.latents = torch.rand(size, 2, 2, 4, 8, 8, generator=generator)
    batch.conditioning = {"encoder_hidden_states": torch.randn(size, 16, 32, generator=generator)}
    batch.empty = {"encoder_hidden_states": torch.zeros(1, 16, 32)}
    batch.chosen = batch.rejected = None
    return batch


def test_compiled_blocks_compute_the_same(tiny_pipeline: Path):
    """The cheapest backend: graphs are captured and run as they are."""
    batch = cached(batch_of([0, 1]))
    eager, compiled = module_of(tiny_pipeline), module_of(tiny_pipeline, compile="eager")
    found, expected = gradients(compiled, batch), gradients(eager, batch)
    assert any(one.abs().max() > 0 for one in expected)
    for one, same in zip(found, expected, strict=True):
        torch.testing.assert_close(one, same, rtol=1e-4, atol=1e-7)
    compiled_blocks = [block for block in compiled.backbone.denoiser.modules() if block._compiled_call_impl is not None]
    assert {type(block).__name__ for block in compiled_blocks} == {"BasicTransformerBlock"}


def test_an_unknown_backend_is_refused(tiny_pipeline: Path):
    with pytest.raises(UserError, match=r"speed\.compile: fast` .*inductor"):
        module_of(tiny_pipeline, compile="fast")


def test_checkpointing_computes_the_same_gradients(tiny_pipeline: Path):
    batch = cached(batch_of([0, 1]))
    plain, again = module_of(tiny_pipeline), module_of(tiny_pipeline, gradient_checkpointing=True)
    unet = again.backbone.denoiser
    assert any(getattr(block, "gradient_checkpointing", False) for block in unet.modules())
    for one, same in zip(gradients(again, batch), gradients(plain, batch), strict=True):
        torch.testing.assert_close(one, same, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("reference", [False, True], ids=["run", "cached"])
def test_a_step_waits_for_nothing(tiny_pipeline: Path, reference: bool):
    """On a meta device there are no values: whatever asks for one (`item`, `bool`, `cpu`) raises."""
    module = module_of(tiny_pipeline, DiffusionDPO(100.0, sft_weight=1.0, anchor_weight=1.0)).to("meta")
    module.prompt_dropout = 0.5
    batch = cached(batch_of([0, 1, 2]))
    if reference:
        batch.fixed_seeds = [5, 6, 7]
        batch.reference = torch.rand(3, 2, 2)
        batch.reference_prediction = torch.rand(3, 2, 4, 8, 8)
    loss = module.training_step(batch.to("meta"), 0)
    loss.backward()
    with pytest.raises(RuntimeError, match="meta"):
        loss.item()


@pytest.mark.parametrize(
    "optimizer", [lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True), None], ids=["fused", "8bit"]
)
def test_optimizers_step(tiny_pipeline: Path, optimizer):
    if optimizer is None:
        bitsandbytes = pytest.importorskip("bitsandbytes")
        optimizer = lambda p: bitsandbytes.optim.AdamW8bit(p, lr=1e-3)  # noqa: E731
    module = module_of(tiny_pipeline)
    parameters = [p for _, p in module.trainable_parameters()]
    before = [p.detach().clone() for p in parameters]
    one = optimizer(parameters)
    for parameter, found in zip(parameters, gradients(module, cached(batch_of([0, 1]))), strict=True):
        parameter.grad = found
    one.step()
    assert any(not torch.equal(p, old) for p, old in zip(parameters, before, strict=True))


def test_a_fused_optimizer_that_would_clip_scaled_gradients_is_refused(tiny_pipeline: Path):
    """Under 16-mixed it divides by the scale only within its step, when the norm has already met the limit."""
    module = module_of(tiny_pipeline)
    parameters = [p for _, p in module.trainable_parameters()]
    module._trainer = SimpleNamespace(precision="16-mixed")  # type: ignore[assignment]
    module._gradient_norm = torch.tensor(1.0)
    with pytest.raises(UserError, match=r"optimizer.init_args.fused: false"):
        module.configure_gradient_clipping(torch.optim.AdamW(parameters, fused=True), 1.0, "norm")
    module.configure_gradient_clipping(torch.optim.AdamW(parameters), 1.0, "norm")
    module._trainer = SimpleNamespace(precision="bf16-mixed")  # type: ignore[assignment]
    module.configure_gradient_clipping(torch.optim.AdamW(parameters, fused=True), 1.0, "norm")
