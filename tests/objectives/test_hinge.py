import torch

from lit_safety.objectives import Hinge, PairErrors, PairLabels, hinge_loss


def test_golden():
    """m = -2: 1 + 2 = 3; m = 0.25: 0.75; m = 1 and m = 5: nothing left, no gradient."""
    m = torch.tensor([-2.0, 0.25, 1.0, 5.0], requires_grad=True)
    loss = hinge_loss(m)
    assert loss.tolist() == [3.0, 0.75, 0.0, 0.0]
    loss.sum().backward()
    assert m.grad is not None
    assert m.grad.tolist() == [-1.0, -1.0, 0.0, 0.0]


def test_a_learned_pair_still_has_its_regulariser():
    """e_w 1, e_l 9, r 5, beta 2: m = -(1)(-8) = 8, so the hinge is 0 and the loss is 3 * e_w = 3."""
    errors = PairErrors(*(torch.tensor([x]) for x in (1.0, 9.0, 5.0, 5.0)))
    labels = PairLabels(torch.zeros(1), *(torch.zeros(1, 2) for _ in range(3)))
    assert Hinge(beta=2.0, sft_weight=3.0)(errors, labels).loss.item() == 3.0
