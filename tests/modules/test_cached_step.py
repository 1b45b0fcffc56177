"""A step on a batch out of a cache, and a gradient's norm that is computed once."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from lit_safety.core.chance import LATENT, NOISE, normal
from lit_safety.data.reading.batch import PairBatch
from lit_safety.modules import PreferenceModule
from lit_safety.objectives import DiffusionDPO


def images(size: int) -> PairBatch:
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = (torch.rand(size, 3, 32, 32, generator=generator) * 2 - 1 for _ in range(2))
    known = torch.zeros(size, 2)
    return PairBatch(
        keys=[str(row) for row in range(size)],
        seeds=list(range(2, 2 + size)),  # of 2, 3 and 4, dropout of one half drops 3
        prompts=["a red cat", "a gun", "a house"][:size],
        prompt_kinds=["harmful"] * size,
        categories=[()] * size,
        orders=["safety"] * size,
        chosen=chosen,
        rejected=rejected,
        clean=torch.zeros(size),
        harmful=known,
        cost=known,
        has_cost=[True] * size,
        score=known,
        has_score=[True] * size,
        has_harmful=[True] * size,
        user_ids=[None] * size,
    )


def as_cached(module: PreferenceModule, batch: PairBatch) -> PairBatch:
    """What a cache made with `module`'s encoders would give for the batch."""
    with torch.no_grad():
        # In one batch, as the step does: with several threads the last bits depend on the batch's size.
        sides = module.backbone.posterior(torch.cat([batch.chosen, batch.rejected])).chunk(2)
        text, empty = module.encode_text(batch.prompts), module.encode_text([""])
    return dataclasses.replace(
        batch, chosen=None, rejected=None, latents=torch.stack(sides, 1), conditioning=text, empty=empty
    )


@pytest.fixture
def module(tiny_pipeline: Path) -> PreferenceModule:
    module = PreferenceModule(str(tiny_pipeline), DiffusionDPO(), prompt_dropout=0.5)
    module.configure_model()
    return module.train()


def test_a_step_from_a_cache_uses_no_encoder_and_is_the_same(module: PreferenceModule, tiny_pipeline: Path):
    batch = images(3)
    other = PreferenceModule(str(tiny_pipeline), DiffusionDPO(), prompt_dropout=0.5)
    other.configure_model()
    cached = as_cached(other.train(), batch)
    assert {"vae", "text_encoder"} & set(module.backbone.parts.loaded) == set()
    found = module.noised(cached)
    assert {"vae", "text_encoder"} & set(module.backbone.parts.loaded) == set()
    expected = module.noised(batch)
    for one, same in zip(found[:3], expected[:3], strict=True):
        assert torch.equal(one, same)
    name = "encoder_hidden_states"
    assert torch.equal(found[3][name], expected[3][name])
    dropped = [torch.equal(row, cached.empty[name][0]) for row in found[3][name]]
    assert dropped[:3] == dropped[3:]
    assert 0 < sum(dropped[:3]) < 3, "some prompts are dropped and some are not"


def test_numbers_of_the_batch_are_used_and_others_are_drawn(module: PreferenceModule):
    batch = images(2)
    ahead = dataclasses.replace(batch, draws={NOISE: torch.full((2, 4, 8, 8), 7.0)})
    assert (module.gaussian(ahead, NOISE, (4, 8, 8)) == 7).all()
    assert torch.equal(module.gaussian(ahead, NOISE, (4, 4, 4)), normal(batch.seeds, NOISE, (4, 4, 4)))
    assert torch.equal(module.gaussian(ahead, LATENT, (4, 8, 8)), normal(batch.seeds, LATENT, (4, 8, 8)))


def test_clipping_by_the_logged_norm_is_clipping(module: PreferenceModule, monkeypatch: pytest.MonkeyPatch):
    """Gradients 3 and 4: the norm is 5; clipped to 1 they are 0.6 and 0.8 (torch divides by norm + 1e-6)."""
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    for parameter, gradient in zip(parameters, (3.0, 4.0), strict=True):
        parameter.grad = torch.tensor([gradient])
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    logged = {}
    monkeypatch.setattr(module, "log", lambda name, value: logged.update({name: value}))
    module.on_before_optimizer_step(optimizer)
    assert logged["grad_norm"] == 5
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda *_: pytest.fail("computed a second time"))
    module.configure_gradient_clipping(optimizer, 1.0, "norm")
    clipped = torch.stack([parameter.grad for parameter in parameters if parameter.grad is not None])
    torch.testing.assert_close(clipped.flatten(), torch.tensor([0.6, 0.8]), rtol=1e-5, atol=0)
