import math

import pytest
import torch

from lit_safety.objectives import FocalInverse, dpo_loss, focal_inverse_loss, scdpo_loss


def gradient(m: torch.Tensor, gamma: float, detach: bool) -> torch.Tensor:
    m = m.clone().requires_grad_(True)
    focal_inverse_loss(m, gamma, detach).sum().backward()
    assert m.grad is not None
    return m.grad


def test_golden():
    """m = 1, gamma 2: p = 0.7310586, p^2 = 0.5344466, -log p = 0.3132617; loss = 0.1674216."""
    assert focal_inverse_loss(torch.tensor([1.0]), 2.0).item() == pytest.approx(0.1674216, rel=1e-6)


@pytest.mark.parametrize("detach", [True, False])
def test_without_focus_it_is_dpo_to_the_bit(detach: bool):
    m = torch.randn(4096, generator=torch.Generator().manual_seed(1)) * 20
    assert torch.equal(focal_inverse_loss(m, 0.0, detach), dpo_loss(m))


def test_with_gamma_one_its_weight_and_that_of_dynamic_focusing_add_up_to_one():
    """p + (1 - p) = 1, so the two losses add up to DPO."""
    m = torch.linspace(-8, 8, 33, dtype=torch.float64)
    torch.testing.assert_close(focal_inverse_loss(m, 1.0) + scdpo_loss(m, 1.0), dpo_loss(m))


def test_detached_gradient_golden():
    """m = 1, gamma 2: p^2 (1 - p) = 0.5344466 * 0.2689414 = 0.1437348, downhill towards a larger margin."""
    assert gradient(torch.tensor([1.0]), 2.0, detach=True).item() == pytest.approx(-0.1437348, rel=1e-5)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_attached_gradient_turns_where_p_is_exp_of_minus_one_over_gamma(gamma: float):
    """gamma 1: p = 1 / e, so m = log(p / (1 - p)) = -log(e - 1) = -0.5413; left of it pairs are made worse."""
    turning = -math.log(math.exp(1 / gamma) - 1)
    left, right = gradient(torch.tensor([turning - 0.1, turning + 0.1]), gamma, detach=False)
    assert left > 0 > right
    assert (gradient(torch.tensor([turning - 0.1, turning + 0.1]), gamma, detach=True) < 0).all()


def test_an_attached_weight_that_starts_in_the_wrong_direction_is_refused():
    FocalInverse(gamma=1.4, detach_focus=False)
    FocalInverse(gamma=2.0)
    with pytest.raises(ValueError, match="gamma must be below 1"):
        FocalInverse(gamma=1.5, detach_focus=False)
    with pytest.raises(ValueError, match="gamma must not be negative"):
        FocalInverse(gamma=-1.0)
