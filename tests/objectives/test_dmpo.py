import math

import pytest
import torch

from lit_safety.objectives import DMPO, PairErrors, PairLabels, dmpo_loss, dpo_loss


def test_golden():
    """alpha 0.2, so q = 0.8. m = 0: p = 0.5, 0.5 log(0.5 / 0.8) + 0.5 log(0.5 / 0.2) = -0.235002 + 0.458145 = 0.223144.
    m = log 4 = 1.386294: p = 0.8 = q, loss 0. m = log 9: p = 0.9, 0.9 log(0.9 / 0.8) + 0.1 log(0.1 / 0.2) = 0.106005
    - 0.069315 = 0.036690. alpha 0.01, m = 0: 0.5 log(0.5 / 0.99) + 0.5 log(0.5 / 0.01) = -0.341548 + 1.956012 =
    1.614463."""
    m = torch.tensor([0.0, math.log(4), math.log(9)])
    assert dmpo_loss(m, 0.2).tolist() == pytest.approx([0.223144, 0.0, 0.036690], abs=1e-6)
    assert dmpo_loss(torch.zeros(1), 0.01).item() == pytest.approx(1.614463, abs=1e-6)


def test_through_errors():
    """beta 2, errors 1.5 and 3, reference 2 and 3: Delta = -0.5, m = 0.5, p = 0.622459; alpha 0.1:
    0.622459 log(0.622459 / 0.9) + 0.377541 log(0.377541 / 0.1) = -0.229511 + 0.501566 = 0.272055."""
    pair = PairErrors(*(torch.tensor([value]) for value in (1.5, 3.0, 2.0, 3.0)))
    output = DMPO(beta=2.0, alpha=0.1)(pair, PairLabels(torch.zeros(1), *(torch.zeros(1, 2) for _ in range(3))))
    assert output.loss.item() == pytest.approx(0.272055, abs=2e-6)


def test_dpo_with_smoothing_is_the_other_divergence():
    """KL(q || p) = q log q + (1 - q) log(1 - q) - q log p - (1 - q) log(1 - p): smoothed DPO less q's entropy. Both are
    smallest at m = log((1 - alpha) / alpha)."""
    m = torch.linspace(-3, 6, 901, dtype=torch.float64)
    q, p = 0.9, torch.sigmoid(m)
    forward = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
    entropy = -(q * math.log(q) + (1 - q) * math.log(1 - q))
    torch.testing.assert_close(dpo_loss(m, 0.1) - entropy, forward)
    for loss in (dmpo_loss(m, 0.1), forward):
        assert m[loss.argmin()].item() == pytest.approx(math.log(9), abs=0.01)


def test_the_gradient_is_what_its_docstring_says():
    m = torch.tensor([-40.0, -2.0, 0.0, math.log(99), 8.0], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(dmpo_loss(m, 0.01).sum(), m)
    p = torch.sigmoid(m.detach())
    torch.testing.assert_close(slope, p * (1 - p) * (m.detach() - math.log(99)))


def test_what_it_refuses_and_needs():
    for alpha in (0.0, 0.5, -0.1):
        with pytest.raises(ValueError, match="alpha"):
            DMPO(alpha=alpha)
    assert (DMPO().needs_overlap, DMPO(mu=0.6).needs_overlap) == (False, True)


def test_the_safeguard_scales_the_losers_gradient_and_leaves_the_value():
    """e_w 2, overlap 3, mu 0.25: kappa 0.75 x 2 / 3 = 0.5, as for Diffusion-SDPO."""
    found = []
    for objective in (DMPO(beta=2.0, mu=0.25), DMPO(beta=2.0)):
        e_w, e_l = torch.tensor([2.0], requires_grad=True), torch.tensor([7.0], requires_grad=True)
        pair = PairErrors(e_w, e_l, torch.tensor([2.5]), torch.tensor([6.0]), overlap=torch.tensor([3.0]))
        output = objective(pair, PairLabels(torch.zeros(1), *(torch.zeros(1, 2) for _ in range(3))))
        output.loss.sum().backward()
        found.append((output.loss.item(), e_w.grad.item(), e_l.grad.item(), output.logs.get("sdpo/scale")))
    (loss, chosen, rejected, scale), (plain, plain_chosen, plain_rejected, none) = found
    assert (loss, chosen, rejected) == (plain, plain_chosen, 0.5 * plain_rejected)
    assert scale.tolist() == [0.5]
    assert none is None
