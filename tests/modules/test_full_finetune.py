"""`policy: full`: every weight of the denoiser is trained against a frozen copy of itself."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy

from lit_safety.core.errors import UserError
from lit_safety.modules import SCDPO
from lit_safety.modules.frozen import check_strategy
from lit_safety.objectives import SafetyConstrainedDPO
from tests.helpers.batches import batch_of


@pytest.fixture
def module(tiny_pipeline: Path) -> SCDPO:
    module = SCDPO(str(tiny_pipeline), SafetyConstrainedDPO(beta=100.0, anchor_weight=1.0), policy="full")
    module.configure_model()
    return module


def test_the_margin_is_exactly_zero_at_the_start(module: SCDPO):
    output = module.loss(module.errors(batch_of([0, 1])), batch_of([0, 1]))
    assert (output.logs["rewards/margins"] == 0).all()
    assert (output.logs["loss/anchor"] == 0).all()


def test_a_step_moves_the_policy_and_not_the_reference(module: SCDPO):
    batch = batch_of([0, 1, 2])
    before = module.errors(batch)
    optimizer = torch.optim.SGD([p for _, p in module.trainable_parameters()], lr=0.05)
    module.loss(before, batch).loss.mean().backward()
    optimizer.step()
    after = module.errors(batch)
    assert torch.equal(after.reference_chosen, before.reference_chosen)
    assert torch.equal(after.reference_rejected, before.reference_rejected)
    assert not torch.equal(after.policy_chosen, before.policy_chosen)


def test_every_weight_of_the_denoiser_is_trained_and_the_copy_is_no_module(module: SCDPO):
    trained = {name for name, _ in module.trainable_parameters()}
    assert trained == {f"backbone.denoiser.{name}" for name, _ in module.backbone.denoiser.named_parameters()}
    assert set(dict(module.named_parameters())) == trained
    assert all(p.dtype == torch.float32 for _, p in module.trainable_parameters())


def test_zero_3_is_refused_by_name():
    with pytest.raises(UserError, match="ZeRO 3"):
        check_strategy(SimpleNamespace(strategy=DeepSpeedStrategy(stage=3)))
    check_strategy(SimpleNamespace(strategy=DeepSpeedStrategy(stage=2)))
    check_strategy(None)
