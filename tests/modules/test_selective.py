"""Selective backward: gradient weights by hand, and the expectation over the draw."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch

from lit_safety.modules import PreferenceModule
from lit_safety.modules import speed as selective_file
from lit_safety.modules.speed import SelectiveBackward, gradient_weights
from lit_safety.objectives import DiffusionDPO, PairErrors, SafetyConstrainedDPO
from tests.helpers.batches import batch_of


@pytest.fixture
def module(tiny_pipeline: Path) -> PreferenceModule:
    """One whose policy has moved, so that the pairs' margins differ."""
    objective = SafetyConstrainedDPO(beta=200.0, sft_weight=1.0, anchor_weight=2.0)
    module = PreferenceModule(str(tiny_pipeline), objective)
    module.configure_model()
    torch.manual_seed(0)
    for name, parameter in module.trainable_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(0, 0.1)
    return module.train()


def gradient(module: PreferenceModule, loss: torch.Tensor) -> torch.Tensor:
    found = torch.autograd.grad(loss, [p for _, p in module.trainable_parameters()], allow_unused=True)
    return torch.cat([torch.zeros(1) if one is None else one.flatten() for one in found])


def test_the_weight_is_1_minus_p_for_diffusion_dpo(module: PreferenceModule):
    """beta 2: m = -Delta = -((0.5 - 0.25) - (1 - 1)) = -0.25, p = 1 / (1 + e^0.25) = 0.4378, slopes +-(beta / 2)(1 -
    p) on the errors e_w = 0.5 and e_l = 1: sqrt((1 - p)^2 (0.5 + 1) / (0.5 + 1)) = 1 - p = 0.5622.
    With sft_weight 1 the slope on e_w is 1.5622: sqrt((1.5622^2 * 0.5 + 0.5622^2 * 1) / 1.5) = 1.0120.
    """
    errors = PairErrors(*(torch.tensor([value]) for value in (0.5, 1.0, 0.25, 1.0)))
    p = 1 / (1 + math.exp(0.25))
    module.objective = DiffusionDPO(beta=2.0)
    output, weights = gradient_weights(module, errors, batch_of([0]))
    assert weights.item() == pytest.approx(1 - p, abs=1e-6)
    assert output.loss.item() == pytest.approx(-math.log(p), abs=1e-6)
    assert not output.loss.requires_grad
    module.objective = DiffusionDPO(beta=2.0, sft_weight=1.0)
    _, weights = gradient_weights(module, errors, batch_of([0]))
    assert weights.item() == pytest.approx(1.0120, abs=1e-4)


def test_probabilities_are_the_weight_within_bounds():
    """Threshold 0.5, least 0.1: 0.01 -> 0.1, 0.25 -> 0.25 / 0.5 = 0.5, 0.5 and more -> 1."""
    found = SelectiveBackward(0.5, 0.1).probabilities(torch.tensor([0.01, 0.25, 0.5, 3.0]))
    torch.testing.assert_close(found, torch.tensor([0.1, 0.5, 1.0, 1.0]))


@pytest.mark.parametrize("settings", [(0.0, 0.1), (0.5, 0.0), (0.5, 1.5)])
def test_settings_that_cannot_be_are_refused(settings: tuple[float, float]):
    with pytest.raises(ValueError, match="threshold must be above 0"):
        SelectiveBackward(*settings)


def test_the_expectation_over_the_draw_is_the_whole_gradient(module: PreferenceModule, monkeypatch: pytest.MonkeyPatch):
    """The sum over all 8 subsets S of 3 pairs of P(S) grad(S); P(S): the product of q in S and of 1 - q outside."""
    batch = batch_of([0, 1, 2])
    whole = gradient(module, module.loss(module.errors(batch), batch).loss.mean())
    with torch.no_grad():
        errors = module.errors(batch)
    weights = gradient_weights(module, errors, batch)[1]
    chosen = SelectiveBackward(2 * float(weights.max()), 0.001)
    q = chosen.probabilities(weights).tolist()
    assert all(one < 1 for one in q)
    assert len(set(q)) == 3
    expected, norms = torch.zeros_like(whole), []
    for kept in itertools.product((False, True), repeat=3):
        draws = dict(zip(batch.seeds, (0.0 if one else 1.0 for one in kept), strict=True))
        monkeypatch.setattr(selective_file, "uniform", lambda seed, purpose, draws=draws: draws[seed])
        loss, output, _ = chosen.step(module, batch)
        assert output.logs["backward/kept"].item() == pytest.approx(sum(kept) / 3)
        assert len(output.loss) == 3
        found = gradient(module, loss)
        norms.append(float(found.norm()))
        expected += math.prod(one if stays else 1 - one for one, stays in zip(q, kept, strict=True)) * found
    assert norms[0] == 0, "nothing stays in"
    assert len(set(norms)) == 8
    torch.testing.assert_close(expected, whole, rtol=0, atol=1e-4 * float(whole.abs().max()))


def test_pairs_that_always_stay_in_are_trained_as_without(module: PreferenceModule):
    batch = batch_of([0, 1, 2])
    whole = module.loss(module.errors(batch), batch).loss.mean()
    loss, output, _ = SelectiveBackward(1e-9).step(module, batch)
    torch.testing.assert_close(loss, whole, rtol=1e-6, atol=0)
    assert output.logs["backward/kept"].item() == 1
    torch.testing.assert_close(gradient(module, loss), gradient(module, whole), rtol=1e-4, atol=1e-6)
