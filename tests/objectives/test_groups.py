"""Losses on groups: golden values, what they are on two images, ties, padding."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lit_safety.objectives import (
    GDRO,
    NCD,
    DiffusionDPO,
    GroupDPO,
    GroupErrors,
    GroupLabels,
    Objective,
    PairErrors,
    PairLabels,
    gdro_loss,
    group_dpo_loss,
    ncd_mod,
    ncd_pair,
    ncd_weights,
)

ALL: list[Objective] = [GDRO(2.0), GroupDPO(2.0), GroupDPO(2.0, label_smoothing=0.1), NCD(2.0), NCD(2.0, "label")]


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def group_of(
    r: list[list[float]], ranks: list[list[int]], harmful: list[list[float]], cost: list[list[float]], beta: float = 2.0
) -> tuple[PairErrors, PairLabels, Tensor]:
    """Errors that give these rewards, r = -(beta / 2)(e - 3); the best and the worst as a pair."""
    policy = (3.0 - torch.tensor(r, dtype=torch.float64) * 2 / beta).requires_grad_(True)
    reference = torch.full_like(policy, 3.0)
    places = torch.tensor(ranks)
    sides = torch.stack([places.masked_fill(places < 0, 99).argmin(1), places.argmax(1)], 1)
    columns = [torch.tensor(one, dtype=torch.float64) for one in (harmful, cost)]
    both = policy.gather(1, sides)
    errors = PairErrors(
        both[:, 0], both[:, 1], *reference.gather(1, sides).unbind(1), groups=GroupErrors(policy, reference)
    )
    known = GroupLabels(places, *columns, torch.zeros_like(columns[0]))
    pair = [one.gather(1, sides) for one in columns]
    labels = PairLabels(torch.zeros(len(r)), *pair, torch.zeros_like(pair[0]), groups=known)
    return errors, labels, policy


def test_gdro_golden() -> None:
    """Rewards 1, -2, 0.5, the first best, the last worst:

    -[1 - log(e^1 + e^-2 + e^0.5)] - [-2 - log(e^-2 + e^0.5)] - [0.5 - 0.5] = 0.5045968 + 2.5788898 = 3.0834866.
    """
    loss = gdro_loss(torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64), torch.tensor([[0, 1, 2]]))
    by_hand = math.log(math.e + math.exp(-2) + math.exp(0.5)) - 1 + math.log(math.exp(-2) + math.exp(0.5)) + 2
    assert loss.item() == pytest.approx(by_hand, rel=1e-12)
    assert loss.item() == pytest.approx(3.0834866, rel=1e-6)


def test_all_pairs_golden() -> None:
    """The same rewards: margins 3, 0.5 and -2.5; the mean of 0.0485874, 0.4740770 and 2.5788898 is 1.0338514."""
    loss = group_dpo_loss(torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64), torch.tensor([[0, 1, 2]]))
    assert loss.item() == pytest.approx(-sum(map(log_sigmoid, (3.0, 0.5, -2.5))) / 3, rel=1e-12)
    assert loss.item() == pytest.approx(1.0338514, rel=1e-6)


def test_ncd_golden() -> None:
    """Rewards 2, -1, 0.5 of a safe and two harmful images, costs -2, 1 and 3."""
    s = [1 / (1 + math.exp(cost)) for cost in (-2, 1, 3)]
    powers = [math.exp(one / 0.1) for one in (s[0] + 0.01, s[1], s[2])]
    w = [one / sum(powers) for one in powers]
    mod = -sum(one * log_sigmoid(r) for one, r in zip(w, (2, -1, 0.5), strict=True))
    mod += -(log_sigmoid(1) + log_sigmoid(-0.5)) / 2
    pair = -(log_sigmoid(3) + log_sigmoid(1.5)) / 2
    given = group_of([[2, -1, 0.5]], [[0, 1, 2]], [[0, 1, 1]], [[-2, 1, 3]])
    assert NCD(2.0)(*given[:2]).loss.item() == pytest.approx(mod + 0.5 * pair, rel=1e-9)
    assert NCD(2.0, pair_weight=0.0)(*given[:2]).loss.item() == pytest.approx(mod, rel=1e-9)
    assert (w[0], mod, pair) == pytest.approx((0.9978, 0.7730, 0.1250), abs=2e-4)


@pytest.mark.parametrize("objective", [GDRO(200.0), GroupDPO(200.0), GroupDPO(200.0, label_smoothing=0.1)])
def test_on_two_images_it_is_diffusion_dpo(objective: Objective) -> None:
    """In value and in gradient, given as groups of two and as pairs."""
    torch.manual_seed(0)
    r = (3 * torch.randn(50, 2)).tolist()
    plain = DiffusionDPO(200.0, label_smoothing=getattr(objective, "label_smoothing", 0.0))
    found = []
    for one, whole in ((objective, True), (objective, False), (plain, False)):
        errors, labels, policy = group_of(r, [[0, 1]] * 50, [[0, 1]] * 50, [[-1, 1]] * 50, beta=200.0)
        if not whole:
            errors.groups = labels.groups = None
        loss = one(errors, labels).loss
        (gradient,) = torch.autograd.grad(loss.sum(), policy)
        found.append((loss.detach(), gradient))
    for loss, gradient in found[:2]:
        torch.testing.assert_close(loss, found[2][0], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(gradient, found[2][1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_ncd_keeps_its_own_term_at_every_number_of_harmful_images(count: int) -> None:
    """Against Diffusion-DPO: at one harmful image L_pair is its loss, and L_mod stays beside it."""
    r = torch.linspace(1.0, -1.5, 1 + count, dtype=torch.float64)[None]
    harmful = torch.tensor([[False] + [True] * count])
    safety = torch.tensor([[1.0] + [0.0] * count], dtype=torch.float64)
    weights = ncd_weights(safety, ~harmful, torch.ones_like(harmful))
    mod, pair = ncd_mod(r, weights, harmful), ncd_pair(r, torch.zeros(1, dtype=torch.long), harmful)
    ranks = [[0] + [1] * count]
    costs = [[-1.0] + [1.0] * count]
    errors, labels, _ = group_of(r.tolist(), ranks, harmful.double().tolist(), costs)
    torch.testing.assert_close(NCD(2.0, "label")(errors, labels).loss, mod + 0.5 * pair)
    assert mod.item() > 0.3
    own = -(weights[0, 0] * log_sigmoid(r[0, 0].item()))
    away = -sum(log_sigmoid(-one) for one in r[0, 1:].tolist()) / count
    assert mod.item() == pytest.approx(float(own) + away, abs=2e-3 * count)
    if count == 1:
        assert pair.item() == pytest.approx(DiffusionDPO(2.0)(errors, labels).loss.item(), rel=1e-9)


@pytest.mark.parametrize("objective", ALL)
def test_a_group_padded_for_a_larger_one_has_its_own_loss(objective: Objective) -> None:
    nan = math.nan
    alone = objective(*group_of([[1, -2]], [[0, 1]], [[0, 1]], [[-1, 1]])[:2]).loss
    errors, labels, policy = group_of(
        [[1, -2, 0, 0], [0.3, 1, -1, 0.2]],
        [[0, 1, -1, -1], [3, 0, 2, 1]],
        [[0, 1, nan, nan], [1, 0, 1, 0]],
        [[-1, 1, nan, nan], [2, -2, 1, -1]],
    )
    output = objective(errors, labels)
    torch.testing.assert_close(output.loss[:1], alone)
    output.loss.sum().backward()
    assert torch.isfinite(policy.grad).all()
    assert policy.grad[0, 2:].tolist() == [0, 0]
    assert policy.grad[1].ne(0).all()


@pytest.mark.parametrize("objective", ALL)
def test_gradients_far_out_and_in_float64(objective: Objective) -> None:
    given = [[200.0, -200.0, 20.0], [-200.0, 200.0, -20.0], [0.4, -1.2, 0.3]]
    ranks, harmful, cost = [[0, 2, 1]] * 3, [[0, 1, 1]] * 3, [[-1, 2, 1]] * 3
    errors, labels, policy = group_of(given, ranks, harmful, cost)
    objective(errors, labels).loss.sum().backward()
    assert torch.isfinite(policy.grad).all()

    def loss(values: Tensor) -> Tensor:
        own, known, _ = group_of(given[2:], ranks[2:], harmful[2:], cost[2:])
        assert own.groups is not None
        both = values.gather(1, torch.tensor([[0, 1]])).unbind(1)
        groups = GroupErrors(values, own.groups.reference)
        return objective(PairErrors(*both, own.reference_chosen, own.reference_rejected, groups=groups), known).loss

    assert torch.autograd.gradcheck(loss, policy.detach()[2:].requires_grad_(True))


def test_tied_images_do_not_compete() -> None:
    """Two equal harmful images: each loses to the safe one, and nothing says which of them is worse."""
    r, ranks = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64), torch.tensor([[0, 1, 1]])
    by_hand = math.log(math.e + math.exp(-2) + math.exp(0.5)) - 1
    assert gdro_loss(r, ranks).item() == pytest.approx(by_hand, rel=1e-12)
    assert group_dpo_loss(r, ranks).item() == pytest.approx(-(log_sigmoid(3.0) + log_sigmoid(0.5)) / 2, rel=1e-12)
    r = torch.tensor([[1.0, -2.0]]).requires_grad_(True)
    for loss in (gdro_loss, group_dpo_loss):
        nothing = loss(r, torch.tensor([[0, 0]]))
        assert nothing.item() == 0.0
        nothing.sum().backward()
    assert r.grad.tolist() == [[0, 0]]


def test_ncd_without_a_safe_or_a_harmful_image() -> None:
    """All harmful: pushed away and nothing else. All safe: drawn to and nothing else."""
    bad = group_of([[0.5, -1]], [[0, 1]], [[1, 1]], [[1, 2]])
    assert NCD(2.0)(*bad[:2]).loss.item() == pytest.approx(-(log_sigmoid(-0.5) + log_sigmoid(1)) / 2)
    good = group_of([[0.5, 0.5]], [[0, 1]], [[0, 0]], [[-2, -1]])
    assert NCD(2.0)(*good[:2]).loss.item() == pytest.approx(-log_sigmoid(0.5))


def test_the_share_of_pairs_in_order_is_logged() -> None:
    given = group_of([[1, -2, 0.5]], [[0, 1, 2]], [[0, 1, 1]], [[-1, 1, 2]])
    assert GDRO(2.0)(*given[:2]).logs["groups/accuracies"].item() == pytest.approx(2 / 3)


def test_ncd_reads_costs_or_labels() -> None:
    assert NCD().needs_cost
    assert not NCD(safety="label").needs_cost
    with pytest.raises(ValueError, match="safety"):
        NCD(safety="judge")  # type: ignore[arg-type]
