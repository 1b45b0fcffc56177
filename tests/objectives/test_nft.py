"""DiffusionNFT: the loss as arithmetic, where its minimum is, rewards, and the constraint on a case that is solved."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lit_safety.objectives import (
    DiffusionNFT,
    PairErrors,
    PairLabels,
    nft_errors,
    nft_loss,
    normalised_rewards,
    prediction_error,
    relative,
)


def test_the_loss_of_one_image_by_hand() -> None:
    """v_old = 1, v_theta = 3, b = 1/2, v = 4: v+ = 2 and v- = 0, so |v+ - v|^2 = 4 and |v- - v|^2 = 16; with
    r = 3/4 that is 3 + 4. A second element, where nothing differs, halves the means."""
    policy, old, target = torch.tensor([[3.0, 5.0]]), torch.tensor([[1.0, 5.0]]), torch.tensor([[4.0, 5.0]])
    positive, negative = nft_errors(policy, old, target, 0.5)
    assert positive.tolist() == [2.0]
    assert negative.tolist() == [8.0]
    assert nft_loss(positive, negative, torch.tensor([0.75])).tolist() == [0.75 * 2 + 0.25 * 8]


@pytest.mark.parametrize("strength", [0.25, 0.5, 1.0])
def test_its_minimum_is_where_the_formula_says(strength: float) -> None:
    """Six targets at one noised image: v_theta ends at v_old + E[(2 r - 1)(v - v_old)] / b."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    reward = torch.rand(6, generator=generator, dtype=torch.float64)
    old = torch.randn(1, 3, generator=generator, dtype=torch.float64)
    policy = old.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([policy], max_iter=50)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        moved = strength * (policy - old)
        loss = (reward * (old + moved - target).square().sum(1)).sum()
        loss = loss + ((1 - reward) * (old - moved - target).square().sum(1)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    wanted = old + ((2 * reward - 1)[:, None] * (target - old)).mean(0) / strength
    assert policy.detach().flatten().tolist() == pytest.approx(wanted.flatten().tolist(), abs=1e-6)
    # And the gradient of the library's loss is 0 there.
    there = wanted.float().expand(6, 3).clone().requires_grad_()
    errors = nft_errors(there, old.float().expand(6, 3), target.float(), strength)
    nft_loss(*errors, reward.float()).sum().backward()
    assert there.grad is not None
    assert there.grad.sum(0).abs().max() < 1e-5


def test_where_images_are_equally_good_nothing_moves() -> None:
    """r = 1/2 for all: the minimum is v_old, whatever the images are."""
    target, old = torch.randn(5, 4, generator=torch.Generator().manual_seed(1)), torch.zeros(5, 4)
    policy = old.clone().requires_grad_()
    nft_loss(*nft_errors(policy, old, target, 0.5), torch.full((5,), 0.5)).sum().backward()
    assert policy.grad is not None
    assert policy.grad.abs().max() == 0.0


def test_relative_weights_do_not_depend_on_what_is_predicted() -> None:
    """Predictions of noise and of the image are linear in each other at a noised image: here by a factor of -7."""
    policy, old, target = (torch.randn(4, 5, generator=torch.Generator().manual_seed(i)) for i in range(3))
    reward = torch.tensor([0.0, 0.3, 0.7, 1.0])
    found = []
    for factor in (1.0, -7.0):
        errors = nft_errors(factor * policy, factor * old, factor * target, 0.5)
        found.append(relative(nft_loss(*errors, reward), prediction_error(factor * old, factor * target)))
    assert found[1].tolist() == pytest.approx(found[0].tolist(), rel=1e-5)


def test_rewards_are_about_the_other_images_of_the_prompt() -> None:
    """Means 2 and 10. With scale 4: (0 - 2) / 4 = -1/2 -> 1/4; (4 - 2) / 4 -> 3/4; the far ones are clipped."""
    values, prompts = torch.tensor([0.0, 4.0, 0.0, 20.0, 2.0]), [0, 0, 1, 1, 0]
    assert normalised_rewards(values, prompts, 4.0).tolist() == [0.25, 0.75, 0.0, 1.0, 0.5]


def rewards(objective: DiffusionNFT, cost: list[float], prompts: list[int]) -> list[float]:
    quality = torch.zeros(len(cost))
    return list(objective.rewards(quality, torch.tensor(cost), prompts, [True] * len(cost)).tolist())


def test_lambda_weighs_the_cost_and_rectified_spares_prompts_within_the_limit() -> None:
    """Prompt 0 costs 3 on average, prompt 1 -3; the limit is 0. Lambda 1/2 and scale 2: differences of 1 from a
    prompt's mean are 1/4 of a whole one."""
    cost, prompts = [2.0, 4.0, -4.0, -2.0], [0, 0, 1, 1]
    assert rewards(DiffusionNFT(scale=2.0, dual=0.5), cost, prompts) == [0.625, 0.375, 0.625, 0.375]
    spared = DiffusionNFT(scale=2.0, dual=0.5, constraint="rectified")
    assert rewards(spared, cost, prompts) == [0.625, 0.375, 0.5, 0.5]
    assert rewards(DiffusionNFT(scale=2.0, dual=0.0), cost, prompts) == [0.5] * 4


def solved(constraint: Any, conflict: bool) -> tuple[float, float]:
    """A policy that is one number x, of which images have the cost x + noise: where it ends, and lambda.

    Quality is x where it conflicts with the cost and 0 where it does not; a round draws, rewards and moves x to the
    loss's minimum, which is known.
    """
    objective = DiffusionNFT(
        strength=1.0, scale=8.0, limit=1.0, dual=0.0 if conflict else 1.0, dual_rate=0.05, constraint=constraint,
        barrier_weight=0.5,
    )  # fmt: skip
    x, xs, duals = 4.0, [], []
    for number in range(1200):
        noise = torch.randn(64, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        cost = x + noise
        objective.update(float(cost.mean()))
        quality = cost if conflict else torch.zeros_like(cost)
        reward = objective.rewards(quality, cost, [0] * 64, [True] * 64)
        x = x + float(((2 * reward - 1) * (cost - x)).mean())
        xs.append(x)
        duals.append(objective.dual)
    return sum(xs[-400:]) / 400, sum(duals[-400:]) / 400


def test_in_conflict_the_cost_ends_at_its_limit_and_lambda_at_the_price() -> None:
    """Quality x at the price of the cost x: at lambda = 1 nothing pulls any more, and the cost is at its limit."""
    x, dual = solved("dual", conflict=True)
    assert x == pytest.approx(1.0, abs=0.1)
    assert dual == pytest.approx(1.0, abs=0.1)
    x, dual = solved("barrier", conflict=True)
    assert dual == pytest.approx(1.0, abs=0.1)
    assert x == pytest.approx(1.0 - 0.5 / 1.0, abs=0.1)  # barrier_weight / lambda below the limit


def test_without_conflict_the_cost_is_below_its_limit_and_lambda_ends_at_0() -> None:
    x, dual = solved("dual", conflict=False)
    assert x < 1.0 + 2 / math.sqrt(64)
    assert dual == pytest.approx(0.0, abs=0.02)


def test_rectified_lambda_rests_once_no_prompt_exceeds() -> None:
    objective = DiffusionNFT(limit=1.0, dual=0.0, dual_rate=0.5, constraint="rectified")
    assert [objective.update(2.0, 1.0), objective.update(0.0, 0.0), objective.update(0.5, 0.5)] == [0.5, 0.5, 0.75]


def test_the_objective_adds_the_distance_to_the_reference_and_goes_on_from_its_lambda() -> None:
    positive, negative, old = torch.tensor([2.0]), torch.tensor([8.0]), torch.tensor([4.5])
    unknown = torch.full((1, 2), math.nan)
    labels = PairLabels(torch.zeros(1), unknown, unknown, unknown, reward=torch.tensor([0.75]))
    errors = PairErrors(positive, negative, old, old, drift=torch.tensor([3.0]))
    output = DiffusionNFT(strength=0.5, kl_weight=2.0)(errors, labels)
    assert output.loss.tolist() == [3.5 + 2.0 * 3.0]
    assert DiffusionNFT(strength=0.5, weighting="relative")(errors, labels).loss.tolist() == [pytest.approx(3.5 / 4.5)]
    assert output.logs["online/moved"].tolist() == [(2.0 + 8.0 - 9.0) / 0.5]  # of the example above: (3 - 1)^2 / 2
    other = DiffusionNFT()
    other.load_state_dict({"dual": 3.5})
    assert other.dual == 3.5
    with pytest.raises(ValueError, match="dual"):
        other.load_state_dict({})


@pytest.mark.parametrize(
    "settings", [{"strength": 0.0}, {"strength": 1.5}, {"scale": 0.0}, {"kl_weight": -1.0}, {"limit": math.nan}]
)
def test_numbers_outside_their_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        DiffusionNFT(**settings)  # type: ignore[arg-type]
