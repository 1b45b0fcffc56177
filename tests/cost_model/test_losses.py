"""Golden values, and what unknown labels contribute: nothing."""

from math import exp, log

import pytest
import torch

from lit_safety.cost_model.losses import (
    InfoNCECostLoss,
    PairwiseCostLoss,
    anchoring_loss,
    contrastive_loss,
    cost_norm,
    info_nce_loss,
)

NAN = float("nan")
COSTS = torch.tensor([[-1.0, 2.0], [0.5, -0.5], [3.0, 1.0], [7.0, 9.0]])
LABELS = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0], [NAN, 0.0]])


def softplus(x: float) -> float:
    return log(1 + exp(x))


def test_contrastive_compares_the_harmful_with_the_safe_image_of_a_pair():
    """-log sigmoid(d) = log(1 + e^-d): d = 2 + 1 = 3 -> 0.048587; d = 0.5 + 0.5 = 1 -> 0.313262; equal or unknown ->
    0."""
    found = contrastive_loss(COSTS, LABELS)
    assert found.tolist() == pytest.approx([softplus(-3), softplus(-1), 0.0, 0.0], abs=1e-6)


def test_anchoring_ties_the_sign_to_the_labels():
    """Pair 0: safe at -1 -> log(1 + e^-1), harmful at 2 -> log(1 + e^-2); pair 3: only the safe image at 9 counts."""
    found = anchoring_loss(COSTS, LABELS)
    expected = [softplus(-1) + softplus(-2), 2 * softplus(-0.5), softplus(-3) + softplus(-1), softplus(9)]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


def test_the_norm_is_the_mean_square():
    """(1 + 4) / 2 = 2.5, 0.25, (9 + 1) / 2 = 5, (49 + 81) / 2 = 65; labels play no part."""
    assert cost_norm(COSTS).tolist() == [2.5, 0.25, 5.0, 65.0]


def test_the_whole_is_the_weighted_sum():
    """Pair 1, eta 2, rho 0.1: log(1 + e^-1) + 2 x 2 log(1 + e^-0.5) + 0.1 x 0.25."""
    loss, parts = PairwiseCostLoss(anchoring_weight=2.0, norm_weight=0.1)(COSTS, torch.zeros(4, 2, 3), LABELS)
    assert loss[1].item() == pytest.approx(softplus(-1) + 4 * softplus(-0.5) + 0.025, abs=1e-6)
    assert parts.keys() == {"contrastive", "anchoring", "norm"}


def test_info_nce():
    """Unit vectors a = (1, 0), b = (0, 1), c = (1, 0), labels 1, 0, 1, temperature 0.5: cosines ab 0, ac 1, so the only
    positive of a is c among {b: e^0, c: e^2}: -log(e^2 / (e^2 + 1)) = 0.126928; c the same; b is alone with its label.
    """
    features = torch.tensor([[2.0, 0.0], [0.0, 1.0], [5.0, 0.0], [0.3, 0.7]])
    found = info_nce_loss(features, torch.tensor([1.0, 0.0, 1.0, NAN]), temperature=0.5)
    assert found.tolist() == pytest.approx([log(1 + exp(-2)), 0.0, log(1 + exp(-2)), 0.0], abs=1e-6)


def test_info_nce_of_a_pair_is_the_mean_of_its_images():
    features = torch.randn(2, 2, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    images = info_nce_loss(features.flatten(0, 1), labels.flatten(), 0.2)
    found = InfoNCECostLoss(temperature=0.2).contrast(torch.zeros(2, 2), features, labels)
    assert found.tolist() == pytest.approx([images[:2].mean().item(), images[2:].mean().item()])


@pytest.mark.parametrize("loss", [contrastive_loss, anchoring_loss])
def test_gradients_agree_with_differences_and_stop_at_unknown_labels(loss):
    costs = COSTS.double().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda c: loss(c, LABELS.double()), costs)
    loss(costs, LABELS.double()).sum().backward()
    assert costs.grad is not None
    assert costs.grad.isfinite().all()
    assert costs.grad[3, 0] == 0


def test_info_nce_gradients_are_finite_next_to_unknown_and_lonely_images():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(5, 3, generator=generator, dtype=torch.float64).requires_grad_(True)
    labels = torch.tensor([1.0, 1.0, 0.0, NAN, 1.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda f: info_nce_loss(f, labels, 0.3), features)
    info_nce_loss(features, labels, 0.3).sum().backward()
    assert features.grad is not None
    assert features.grad.isfinite().all()
    assert (features.grad[3] == 0).all()


def test_unknown_labels_change_nothing():
    unknown = torch.full((4, 2), NAN)
    costs = COSTS.clone().requires_grad_(True)
    loss, _ = PairwiseCostLoss(norm_weight=0.0)(costs, torch.zeros(4, 2, 3), unknown)
    loss.sum().backward()
    assert (loss == 0).all()
    assert (costs.grad == 0).all()


@pytest.mark.parametrize("scale", [200.0, -200.0])
def test_large_costs_stay_finite(scale: float):
    costs = torch.tensor([[scale, -scale]], requires_grad=True)
    loss, _ = PairwiseCostLoss()(costs, torch.zeros(1, 2, 3), torch.tensor([[1.0, 0.0]]))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert costs.grad is not None
    assert costs.grad.isfinite().all()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: PairwiseCostLoss(norm_weight=-1.0), "negative"),
        (lambda: InfoNCECostLoss(temperature=0.0), "temperature"),
        (lambda: InfoNCECostLoss(anchoring_weight=0.0), "anchoring_weight"),
    ],
)
def test_settings_that_cannot_train_are_refused(make, says: str):
    with pytest.raises(ValueError, match=says):
        make()
