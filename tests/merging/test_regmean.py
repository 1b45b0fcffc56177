"""The closed form of regmean, written out by hand."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from lit_safety.adapters.low_rank import LowRank
from lit_safety.merging.regmean import Grams, anchored, balance

torch.manual_seed(0)
TINY = 1e-12


def update(rows: list[list[float]], scale: float = 1.0) -> LowRank:
    """A whole update as factors: b the identity."""
    a = torch.tensor(rows)
    return LowRank(a, torch.eye(len(a)), scale)


def diagonal(*values: float) -> torch.Tensor:
    return torch.diag(torch.tensor(values))


def random_parts(count: int = 3, out: int = 5, inputs: int = 4, rank: int = 2) -> list[LowRank]:
    return [LowRank(torch.randn(rank, inputs), torch.randn(out, rank), 0.5) for _ in range(count)]


def random_gram(inputs: int = 4, tokens: int = 50) -> torch.Tensor:
    x = torch.randn(inputs, tokens)
    return x @ x.T / tokens


def test_by_hand():
    """W1 = [2 0], W2 = [0 4] (scale 2), G1 = diag(1, 1), G2 = diag(3, 1), G0 = diag(0, 6), mu 1/2:
    |W1|^2 = 4, tr(W1 G1 W1') = 4, so l1 = 1; |W2|^2 = 16, tr(W2 G2 W2') = 16, so l2 = 1
    sum l W G = [2 0] + [0 4] = [2 4]; sum l G = diag(4, 2), its trace 6; c = 6 / 6 = 1
    the matrix is diag(4, 2) + diag(0, 3) = diag(4, 5): dW = [2/4, 4/5]"""
    grams = Grams((diagonal(1, 1), diagonal(3, 1)), diagonal(0, 6))
    found = anchored([update([[2.0, 0.0]]), update([[0.0, 2.0]], 2.0)], grams, 0.5, TINY)
    assert found.delta().tolist()[0] == pytest.approx([0.5, 0.8])
    assert found.rank == 2


def test_the_ridge_by_hand():
    """W = [3 0] with G = diag(2, 0), l = 9/18 = 1/2: matrix diag(1, 0), t = 1/2, epsilon 1 adds diag(0.5, 0.5)."""
    grams = Grams((diagonal(2, 0),), diagonal(0, 0))
    assert anchored([update([[3.0, 0.0]])], grams, 1.0, 1.0).delta().tolist() == [[pytest.approx(3 * 1 / 1.5), 0.0]]


def test_weights_count_an_experts_inputs_more():
    """W = [1] and [3] on the same input, l = 1 each: the mean 2; with the second counting three times (1 + 9) / 4."""
    parts, grams = [update([[1.0]]), update([[3.0]])], Grams((diagonal(1), diagonal(1)), diagonal(0))
    assert anchored(parts, grams, 0.0, TINY).delta().item() == pytest.approx(2.0)
    assert anchored(parts, grams, 0.0, TINY, [1.0, 3.0]).delta().item() == pytest.approx(2.5)
    assert anchored(parts, grams, 0.0, TINY, [1.0, 0.0]).delta().item() == pytest.approx(1.0)


def test_it_minimises_what_it_says_it_does():
    """No step away from the closed form makes the objective smaller."""
    parts, own, anchor = random_parts(), tuple(random_gram() for _ in range(3)), random_gram()
    mu, epsilon = 0.7, 0.05
    found = anchored(parts, Grams(own, anchor), mu, epsilon).delta()
    shares = [balance(part, gram.double()) for part, gram in zip(parts, own, strict=True)]
    total = sum(share * gram.double() for share, gram in zip(shares, own, strict=True))
    unit = total.trace() / anchor.double().trace()
    ridge = (total + mu * unit * anchor.double()).trace() / 4

    def objective(delta: torch.Tensor) -> torch.Tensor:
        own_part = sum(
            share * ((delta - part.delta()) @ gram.double() @ (delta - part.delta()).T).trace()
            for share, part, gram in zip(shares, parts, own, strict=True)
        )
        clean = mu * unit * (delta @ anchor.double() @ delta.T).trace()
        return own_part + clean + epsilon * ridge * delta.square().sum()

    free = found.clone().requires_grad_()
    (slope,) = torch.autograd.grad(objective(free), free)
    assert slope.abs().max() < 1e-6
    for _ in range(5):
        assert objective(found + 0.01 * torch.randn(5, 4).double()) > objective(found)


def test_mu_takes_from_clean_inputs_and_the_rank_stays_exact():
    parts, own, anchor = random_parts(), tuple(random_gram() for _ in range(3)), random_gram()
    found = [anchored(parts, Grams(own, anchor), mu, 1e-4) for mu in (0.0, 0.1, 1.0, 10.0)]
    clean = [float((one.delta() @ anchor.double() @ one.delta().T).trace()) for one in found]
    assert all(later < earlier for earlier, later in pairwise(clean))
    assert {one.rank for one in found} == {6}
    assert all(torch.equal(one.b, torch.cat([part.b for part in parts], 1).double()) for one in found)


def test_experts_whose_inputs_do_not_meet_are_merged_without_loss():
    """Orthogonal inputs: on each expert's own ones the merge does what the expert does."""
    parts = random_parts(2)
    basis, _ = torch.linalg.qr(torch.randn(4, 4))
    own = tuple(basis[:, 2 * k : 2 * k + 2] @ basis[:, 2 * k : 2 * k + 2].T for k in range(2))
    found = anchored(parts, Grams(own, torch.zeros(4, 4)), 0.0, 1e-9).delta()
    for part, gram in zip(parts, own, strict=True):
        torch.testing.assert_close(found @ gram.double(), part.delta() @ gram.double(), rtol=1e-5, atol=1e-6)


def test_an_expert_that_does_nothing_in_the_layer_counts_nothing():
    """Not adapted, a zero update, or one that is blind to its inputs: no division by 0, and as if it were not there."""
    one, gram = update([[1.0, 2.0]]), diagonal(1, 2)
    idle = LowRank(torch.zeros(0, 2), torch.zeros(1, 0))
    zero = LowRank(torch.ones(1, 2), torch.zeros(1, 1))
    blind = update([[0.0, 1.0]])
    alone = anchored([one], Grams((gram,), gram), 0.5, 1e-4).delta()
    for other, its in ((idle, gram), (zero, gram), (blind, diagonal(1, 0))):
        assert balance(other, its.double()) == 0.0
        found = anchored([one, other], Grams((gram, its), gram), 0.5, 1e-4)
        assert torch.equal(found.delta(), alone)
    nothing = anchored([idle, zero], Grams((gram, gram), gram), 0.5, 1e-4)
    assert nothing.rank == 0
    assert nothing.shape == (1, 2)


def test_a_layer_that_nothing_clean_reaches_is_merged_by_the_experts_alone():
    parts, own = random_parts(2), (random_gram(), random_gram())
    found = anchored(parts, Grams(own, torch.zeros(4, 4)), 5.0, 1e-4)
    assert torch.equal(found.delta(), anchored(parts, Grams(own, random_gram()), 0.0, 1e-4).delta())


def test_a_matrix_that_rounding_made_indefinite_is_solved_too():
    """The last eigenvalue lies below 0 by more than the ridge lifts it."""
    gram = diagonal(1, -1e-3)
    found = anchored([update([[1.0, 0.0]])], Grams((gram,), torch.zeros(2, 2)), 0.0, 1e-5).delta()
    assert torch.isfinite(found).all()
    assert found[0, 0].item() == pytest.approx(1.0, abs=1e-3)
    assert abs(found[0, 1].item()) < 1e-6
