import math
from dataclasses import replace

import pytest
import torch

from lit_safety.objectives import DiffusionDPO, PairErrors, PairLabels, delta, dpo_loss, margin, prediction_error


def errors(chosen: float, rejected: float, reference_chosen: float, reference_rejected: float) -> PairErrors:
    return PairErrors(*(torch.tensor([x]) for x in (chosen, rejected, reference_chosen, reference_rejected)))


LABELS = PairLabels(
    clean=torch.zeros(1),
    harmful=torch.tensor([[0.0, 1.0]]),
    cost=torch.tensor([[-1.0, 1.0]]),
    score=torch.tensor([[0.8, 0.2]]),
)


def test_prediction_error_is_the_mean_over_everything_but_the_batch():
    """Differences 1, -1, 2, 0 give (1 + 1 + 4 + 0) / 4 = 1.5; the second row's are all 3: 9."""
    prediction = torch.tensor([[[[1.0, -1.0]], [[2.0, 0.0]]], [[[3.0, 3.0]], [[3.0, 3.0]]]])
    assert prediction_error(prediction, torch.zeros_like(prediction)).tolist() == [1.5, 9.0]


def test_prediction_error_is_reduced_in_fp32():
    """In bf16 4096 + 1 is 4096; the mean of 255 ones and a 4 (squared: 255 + 16) over 256 is 271 / 256."""
    prediction = torch.ones(1, 256, dtype=torch.bfloat16)
    prediction[0, 0] = 4.0
    error = prediction_error(prediction, torch.zeros_like(prediction))
    assert error.dtype is torch.float32
    assert error.item() == 271 / 256


def test_margin_and_loss_golden():
    """e_w 0.10, e_l 0.20, r_w 0.12, r_l 0.19: Delta = (0.10 - 0.20) - (0.12 - 0.19) = -0.10 + 0.07 = -0.03.

    beta 200: m = -(200 / 2) * -0.03 = 3; loss = -log sigmoid(3) = log(1 + e^-3) = 0.0485873.
    With label smoothing 0.1: 0.9 * 0.0485873 + 0.1 * log(1 + e^3) = 0.0437286 + 0.1 * 3.0485873 = 0.3485873.
    """
    pair = errors(0.10, 0.20, 0.12, 0.19)
    torch.testing.assert_close(delta(pair), torch.tensor([-0.03]))
    m = margin(pair, beta=200.0)
    torch.testing.assert_close(m, torch.tensor([3.0]), rtol=1e-5, atol=1e-5)
    assert dpo_loss(torch.tensor([3.0])).item() == pytest.approx(math.log1p(math.exp(-3)), rel=1e-6)
    assert dpo_loss(torch.tensor([3.0]), 0.1).item() == pytest.approx(0.3485873, rel=1e-6)


def test_margin_is_exactly_zero_when_policy_equals_reference():
    """Numbers whose sums round differently in another order: (a - b) - (a - b) could be 0 anyway, a-a is 0 always."""
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = torch.rand(1000, generator=generator), 1e3 * torch.rand(1000, generator=generator)
    m = margin(PairErrors(chosen, rejected, chosen.clone(), rejected.clone()), beta=5000.0)
    assert (m == 0).all()


def test_gradient_in_float64():
    m = torch.linspace(-5, 5, 11, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: dpo_loss(x, 0.1), (m,))


def test_regularisers_golden():
    """Chosen error 0.10, drift 0.02, clean prompt; m as above (3): loss = 0.0485873 + 5 * 0.10 + 20 * 0.02 = 0.9485873.

    On a harmful prompt the anchor is 0: 0.0485873 + 0.5 = 0.5485873.
    """
    pair = errors(0.10, 0.20, 0.12, 0.19)
    pair.drift = torch.tensor([0.02])
    objective = DiffusionDPO(beta=200.0, sft_weight=5.0, anchor_weight=20.0)
    clean = replace(LABELS, clean=torch.ones(1))
    output = objective(pair, clean)
    assert output.loss.item() == pytest.approx(0.9485873, rel=1e-5)
    assert output.logs["loss/sft"].item() == pytest.approx(0.10)
    assert output.logs["loss/anchor"].item() == pytest.approx(0.02)
    assert objective(pair, LABELS).loss.item() == pytest.approx(0.5485873, rel=1e-5)


def test_logged_rewards_follow_the_definition():
    """-(200 / 2)(0.10 - 0.12) = 2 for the chosen image, -(200 / 2)(0.20 - 0.19) = -1 for the rejected one, margin 3."""
    logs = DiffusionDPO(beta=200.0)(errors(0.10, 0.20, 0.12, 0.19), LABELS).logs
    assert logs["rewards/chosen"].item() == pytest.approx(2.0, rel=1e-5)
    assert logs["rewards/rejected"].item() == pytest.approx(-1.0, rel=1e-4)
    assert logs["rewards/margins"].item() == pytest.approx(3.0, rel=1e-4)
    assert logs["rewards/accuracies"].item() == 1.0
    assert logs["delta/chosen"].item() == pytest.approx(-0.02, rel=1e-5)


def test_anchor_without_predictions_is_refused():
    with pytest.raises(ValueError, match="anchor_weight"):
        DiffusionDPO(anchor_weight=1.0)(errors(0.1, 0.2, 0.1, 0.2), LABELS)


@pytest.mark.parametrize("settings", [{"beta": 0.0}, {"sft_weight": -1.0}, {"label_smoothing": 0.5}])
def test_settings_out_of_range_are_refused(settings: dict[str, float]):
    with pytest.raises(ValueError, match=next(iter(settings))):
        DiffusionDPO(**settings)
