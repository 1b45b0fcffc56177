import pytest
import torch

from lit_safety.objectives import hinge_loss, ipo_loss


def test_golden():
    """m = 3: (3 - 0.5)^2 = 6.25. m = 0: 0.25, gradient 2 (0 - 0.5) = -1. m = 0.5 is the minimum."""
    m = torch.tensor([3.0, 0.0, 0.5], requires_grad=True)
    loss = ipo_loss(m)
    assert loss.tolist() == [6.25, 0.25, 0.0]
    loss.sum().backward()
    assert m.grad is not None
    assert m.grad.tolist() == [5.0, -1.0, 0.0]


def test_trl_form_is_the_same_loss_over_tau_squared():
    """tau 4, h = 0.75: m = 3; TRL's (h - 1 / (2 tau))^2 = (0.75 - 0.125)^2 = 0.390625 = 6.25 / 16."""
    assert ipo_loss(torch.tensor([3.0])).item() / 4**2 == pytest.approx(0.390625)


def test_a_squared_hinge_is_ipo_moved_by_half_a_logit():
    """Below its corner, (1 - m)^2 = ((m - 0.5) - 0.5)^2."""
    m = torch.linspace(-3, 1, 9, dtype=torch.float64)
    torch.testing.assert_close(hinge_loss(m).square(), ipo_loss(m - 0.5))
