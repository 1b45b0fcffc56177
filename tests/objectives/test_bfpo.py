import math

import pytest
import torch

from lit_safety.objectives import BFPO, PairErrors, PairLabels, bfpo_loss, bfpo_target, hinge_loss, ipo_loss

NAN = float("nan")
#: (chosen, rejected), 1 harmful: both safe, only the chosen safe, only the rejected safe, both harmful.
CASES = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])


def test_golden():
    """Targets 0.5, 1, -1, -0.5. At m = 2: 1.5^2 = 2.25, 1^2 = 1, 3^2 = 9, 2.5^2 = 6.25."""
    assert bfpo_target(CASES).tolist() == [0.5, 1.0, -1.0, -0.5]
    assert bfpo_loss(torch.full((4,), 2.0), CASES).tolist() == [2.25, 1.0, 9.0, 6.25]


def test_two_safe_images_are_ipo_to_the_bit():
    m = torch.randn(512, generator=torch.Generator().manual_seed(0))
    assert torch.equal(bfpo_loss(m, torch.zeros(512, 2)), ipo_loss(m))


def test_a_safe_and_a_harmful_image_are_a_squared_hinge_below_its_corner():
    m = torch.linspace(-4, 1, 11)
    torch.testing.assert_close(bfpo_loss(m, CASES[1].expand(11, 2)), hinge_loss(m).square())


def test_exchanging_the_two_images_turns_the_target_round_unless_labels_agree():
    """Only pairs of unequal labels say which image is safer: 1 and -1. With equal labels the stored order decides."""
    m = torch.linspace(-3, 3, 7)
    safe_first, harmful_first = CASES[1].expand(7, 2), CASES[2].expand(7, 2)
    assert torch.equal(bfpo_loss(m, safe_first), bfpo_loss(-m, harmful_first))


def test_unknown_labels_give_nan_or_count_nothing():
    """The second and third pair lack a label: 0 with no gradient, and 1 / 3 of the pairs trains."""
    harmful = torch.tensor([[0.0, 1.0], [NAN, 1.0], [0.0, NAN]])
    m = torch.zeros(3, requires_grad=True)
    assert [math.isnan(x) for x in bfpo_loss(m, harmful).tolist()] == [False, True, True]
    loss = bfpo_loss(m, harmful, skip_unknown=True)
    assert loss.tolist() == [1.0, 0.0, 0.0]
    loss.sum().backward()
    assert m.grad is not None
    assert m.grad.tolist() == [-2.0, 0.0, 0.0]
    labels = PairLabels(torch.zeros(3), harmful, torch.zeros(3, 2), torch.zeros(3, 2))
    errors = PairErrors(*(torch.ones(3) for _ in range(4)))
    assert BFPO(skip_unknown=True)(errors, labels).logs["bfpo/known"].mean().item() == pytest.approx(1 / 3)


def test_labels_are_needed_unless_unknown_ones_are_skipped():
    assert BFPO().needs_harmful
    assert not BFPO(skip_unknown=True).needs_harmful
