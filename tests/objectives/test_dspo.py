import pytest
import torch

from lit_safety.objectives import DSPO, PairErrors, PairLabels, dspo_loss, prediction_error


def labels(count: int = 1) -> PairLabels:
    return PairLabels(torch.zeros(count), *(torch.zeros(count, 2) for _ in range(3)))


def test_golden():
    """Two numbers a prediction. Target n = (0, 0), p = (1, 2), p_ref = (1, 3): e_w = 2.5, r_w = 5, d = 0.5.

    sigma(-m) = 0.5 at m = 0; beta 0.5 gives k = 0.25: residual (1, 2) - 0.25 (0, -1) = (1, 2.25), its mean square
    (1 + 5.0625) / 2 = 3.03125. By the formula: 2.5 - 0.25 (2.5 - 5 + 0.5) + 0.0625 x 0.5 = 2.5 + 0.5 + 0.03125.
    """
    e_w, r_w, d = (torch.tensor([value]) for value in (2.5, 5.0, 0.5))
    assert dspo_loss(e_w, r_w, d, torch.zeros(1), 0.5).item() == pytest.approx(3.03125)


def test_it_is_the_square_that_the_published_trainer_computes():
    """Against predictions: mean of ((p - n) - beta (1 - sigma(m)) (p - p_ref))^2, and its gradient through all of p."""
    torch.manual_seed(0)
    target, reference = torch.randn(6, 4, 3, 3, dtype=torch.float64), torch.randn(6, 4, 3, 3, dtype=torch.float64)
    policy = (reference + 0.3 * torch.randn_like(reference)).requires_grad_(True)

    def error(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a - b).square().flatten(1).mean(1)

    (e_w, e_l), (r_w, r_l) = error(policy, target).chunk(2), error(reference, target).chunk(2)
    pair = PairErrors(e_w, e_l, r_w, r_l, drift=error(policy[:3], reference[:3]))
    found = DSPO(beta=0.7)(pair, labels(3)).loss
    m = -0.35 * ((e_w - e_l) - (r_w - r_l))
    step = 0.7 * (1 - torch.sigmoid(m))[:, None, None, None] * (policy - reference)[:3]
    expected = ((policy - target)[:3] - step).square().flatten(1).mean(1)
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad(loss.sum(), policy, retain_graph=True)[0] for loss in (found, expected))
    torch.testing.assert_close(ours, theirs)
    assert ours[3:].abs().max() > 0  # the rejected images, through sigma(m)


def test_an_untrained_policy_gets_the_chosen_errors_gradient_times_1_less_half_beta():
    policy, target = torch.randn(1, 8, requires_grad=True), torch.randn(1, 8)
    reference = policy.detach()
    e_w, r_w = prediction_error(policy, target), prediction_error(reference, target)
    rejected = torch.tensor([2.0], requires_grad=True)
    pair = PairErrors(e_w, rejected, r_w, torch.tensor([2.0]), drift=prediction_error(policy, reference))
    (slope,) = torch.autograd.grad(DSPO(beta=0.5)(pair, labels()).loss.sum(), policy, retain_graph=True)
    (own,) = torch.autograd.grad(e_w.sum(), policy)
    torch.testing.assert_close(slope, 0.75 * own)


def test_what_it_needs_and_refuses():
    assert DSPO().needs_drift
    assert (DSPO().needs_overlap, DSPO(mu=0.2).needs_overlap) == (False, True)
    same = torch.ones(1)
    with pytest.raises(ValueError, match="drift"):
        DSPO()(PairErrors(same, same, same, same), labels())
    with pytest.raises(ValueError, match="beta must be below 2"):
        DSPO(beta=5000.0)
    with pytest.raises(ValueError, match="mu"):
        DSPO(mu=2.0)
