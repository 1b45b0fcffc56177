"""A linear utility: the same slope for every margin, up to a limit."""

import pytest
import torch

from lit_safety.objectives import LinearDPO, PairErrors, PairLabels, linear_loss


def test_linear_golden() -> None:
    """beta 100: pair 1 has e_w 0.25, e_l 0.3 over 0.2 and 0.2: m = -50 (0.05 - 0.1) = 2.5, so the loss is -2.5; pair
    2 has e_w 0.3, e_l 0.25: m = -2.5, the loss 2.5. d/de_w = 50 and d/de_l = -50 for both."""
    chosen, rejected = (torch.tensor(numbers, requires_grad=True) for numbers in ([0.25, 0.3], [0.3, 0.25]))
    reference = torch.full((2,), 0.2)
    labels = PairLabels(torch.zeros(2), *(torch.zeros(2, 2) for _ in range(3)))
    output = LinearDPO(beta=100.0)(PairErrors(chosen, rejected, reference, reference), labels)
    torch.testing.assert_close(output.loss.detach(), torch.tensor([-2.5, 2.5]))
    output.loss.sum().backward()
    torch.testing.assert_close(chosen.grad, torch.tensor([50.0, 50.0]))
    torch.testing.assert_close(rejected.grad, torch.tensor([-50.0, -50.0]))


def test_beyond_its_limit_a_pair_has_no_gradient() -> None:
    """Limit 2: margins 1, 2.5 and -3 give -1, -2 and 3, with slopes -1, 0 and -1."""
    m = torch.tensor([1.0, 2.5, -3.0], requires_grad=True)
    loss = linear_loss(m, 2.0)
    assert loss.tolist() == [-1.0, -2.0, 3.0]
    loss.sum().backward()
    assert m.grad is not None
    assert m.grad.tolist() == [-1.0, 0.0, -1.0]


def test_a_limit_that_cannot_be_meant_is_refused() -> None:
    with pytest.raises(ValueError, match="limit"):
        LinearDPO(limit=0.0)
