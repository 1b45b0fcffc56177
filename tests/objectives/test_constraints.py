"""Quality under a limit on the expected cost, in a case whose optimum is known by hand.

Two images: quality 1 and 0, cost 1 and -1. The policy that maximises E[quality - lambda cost] - KL to the uniform one
has p = sigmoid(1 - 2 lambda) on the first, so E[cost] = 2p - 1 = tanh((1 - 2 lambda) / 2). So lambda* is 1/2 where the
limit is 0, 1 where it is -tanh(1/2), and 0 where it is above tanh(1/2) = 0.4621: the limit does not bind.
"""

from __future__ import annotations

import math

import pytest
import torch

from lit_safety.cost_model.ensemble import pessimistic
from lit_safety.objectives import ConstrainedDPO, RePO, barrier, barrier_slope, rectified_excess, repo_penalty

HALF = math.tanh(0.5)


def cost_at(dual: float) -> float:
    """E[cost] of the best policy for a lambda."""
    return math.tanh((1 - 2 * dual) / 2)


def run(objective: ConstrainedDPO, updates: int = 4000) -> float:
    """The outer loop with the inner problem solved exactly; returns E[cost] at the end."""
    for _ in range(updates):
        objective.update(cost_at(objective.dual))
    return cost_at(objective.dual)


@pytest.mark.parametrize(("limit", "best"), [(0.0, 0.5), (-HALF, 1.0), (0.6, 0.0), (HALF, 0.0)])
@pytest.mark.parametrize("start", [0.0, 3.0])
def test_dual_ascent_ends_at_the_optimum(limit: float, best: float, start: float) -> None:
    objective = ConstrainedDPO(limit=limit, dual=start, dual_rate=0.05)
    found = run(objective)
    assert objective.dual == pytest.approx(best, abs=5e-3)
    assert found <= limit + 5e-3
    assert objective.dual * (limit - found) == pytest.approx(0.0, abs=1e-3)  # complementary slackness


@pytest.mark.parametrize(("limit", "best"), [(0.0, 0.5), (-HALF, 1.0), (0.6, 0.0)])
def test_the_rectified_form_rises_to_the_optimum_and_rests(limit: float, best: float) -> None:
    objective = ConstrainedDPO(limit=limit, dual=0.0, dual_rate=0.05, constraint="rectified")
    before = 0.0
    for _ in range(4000):
        objective.update(cost_at(objective.dual))
        assert objective.dual >= before
        before = objective.dual
    assert objective.dual == pytest.approx(best, abs=5e-3)
    objective.update(-5.0)  # a safe policy does not lower it
    assert objective.dual == before


def test_a_harmless_prompt_does_not_make_up_for_a_harmful_one() -> None:
    """A second prompt has cost -1 whatever is drawn. The mean over both is below 0 at every lambda, so dual ascent
    leaves lambda at 0 with the first prompt at 0.4621; the rectified form goes to its optimum, 1/2."""
    mean = ConstrainedDPO(limit=0.0, dual=0.0, dual_rate=0.05)
    each = ConstrainedDPO(limit=0.0, dual=0.0, dual_rate=0.05, constraint="rectified")
    for _ in range(4000):
        for one in (mean, each):
            costs = [cost_at(one.dual), -1.0]
            one.update(sum(costs) / 2, rectified_excess(costs, ["a", "b"], one.limit))
    assert mean.dual == 0.0
    assert cost_at(mean.dual) == pytest.approx(0.4621, abs=1e-4)
    assert each.dual == pytest.approx(0.5, abs=5e-3)


def test_rectified_excess_golden() -> None:
    """Prompt a: mean of 1 and 3 is 2, 0.5 above 1.5; b: -4, below. The mean over the two prompts is 0.25."""
    assert rectified_excess([1.0, -4.0, 3.0], ["a", "b", "a"], 1.5) == pytest.approx(0.25)
    assert rectified_excess([], [], 0.0) == 0.0
    assert math.isnan(rectified_excess([math.nan, -4.0], ["a", "b"], 0.0))


def test_the_barrier_ends_inside_by_its_weight_over_lambda() -> None:
    """lambda = t / (limit - E[cost]). With limit 0 and t = tanh(1/2), lambda = 1 and E[cost] = -tanh(1/2) solve it."""
    objective = ConstrainedDPO(dual=0.0, dual_rate=0.05, constraint="barrier", barrier_weight=HALF, barrier_edge=0.01)
    assert run(objective) == pytest.approx(-HALF, abs=1e-6)
    assert objective.dual == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("weight", [0.1, 0.01, 0.001])
def test_the_barrier_goes_to_the_optimum_as_its_weight_goes_to_0(weight: float) -> None:
    settings = {"dual_rate": weight / 10, "barrier_weight": weight, "barrier_edge": weight / 10}
    objective = ConstrainedDPO(dual=0.0, constraint="barrier", **settings)  # type: ignore[arg-type]
    found = run(objective, 100_000)
    assert -2.5 * weight < found < 0.0
    assert 0.5 < objective.dual < 0.5 + 2.5 * weight
    assert objective.dual * (0.0 - found) == pytest.approx(weight, rel=1e-3)


def test_the_barrier_begins_outside_and_is_continued_by_its_tangent() -> None:
    """Edge 0.1: at C = limit - 0.1 it is log 10 with slope 10, and beyond it rises by 10 for each unit."""
    assert barrier(0.4, 0.5, 0.1) == pytest.approx(math.log(10))
    assert barrier(2.4, 0.5, 0.1) == pytest.approx(math.log(10) + 20)
    assert barrier(-0.5, 0.5, 0.1) == 0.0
    for cost in (-3.0, 0.0, 0.39, 0.41, 0.5, 4.0):
        slope = (barrier(cost + 1e-6, 0.5, 0.1) - barrier(cost - 1e-6, 0.5, 0.1)) / 2e-6
        assert barrier_slope(cost, 0.5, 0.1) == pytest.approx(slope, rel=1e-4)
    objective = ConstrainedDPO(dual=0.0, dual_rate=1.0, constraint="barrier", limit=0.5, barrier_weight=0.3)
    assert objective.update(4.0) == pytest.approx(3.0)
    assert objective.update(-0.5) == pytest.approx(0.3)


def test_a_pessimistic_cost_holds_the_true_one_below_the_limit() -> None:
    """Two heads say c - 0.2 and c + 0.2: mean + 1 std is c + 0.2. With the limit 0.2 - tanh(1/2), lambda* is 1."""
    heads = torch.tensor([[0.8, -1.2], [1.2, -0.8]], dtype=torch.float64)
    assert pessimistic(heads, 1.0).tolist() == pytest.approx([1.2, -0.8])
    assert pessimistic(heads, 0.0).tolist() == pytest.approx([1.0, -1.0])
    objective = ConstrainedDPO(limit=0.2 - HALF, dual=0.0, dual_rate=0.05)
    for _ in range(4000):
        p = (1 + cost_at(objective.dual)) / 2
        objective.update(float(pessimistic(heads, 1.0) @ torch.tensor([p, 1 - p], dtype=torch.float64)))
    assert objective.dual == pytest.approx(1.0, abs=5e-3)
    assert cost_at(objective.dual) == pytest.approx(-HALF, abs=5e-3)


def test_repo_rectifies_at_its_limit() -> None:
    """Costs -1 and 2, rewards 3 and 0, limit 0.5: 0 + 1.5 log 2."""
    penalty = repo_penalty(torch.tensor([3.0]), torch.tensor([0.0]), torch.tensor([[-1.0, 2.0]]), 0.5)
    assert penalty.item() == pytest.approx(1.5 * math.log(2), rel=1e-6)
    assert RePO(limit=0.5).limit == 0.5


@pytest.mark.parametrize(
    "settings",
    [
        {"constraint": "soft"},
        {"barrier_weight": 0.0},
        {"barrier_edge": -1.0},
        {"constraint": "barrier", "dual_rate": 2.0},
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"constraint|barrier|dual_rate"):
        ConstrainedDPO(**settings)  # type: ignore[arg-type]


def test_lambda_of_every_form_goes_on_from_a_checkpoint() -> None:
    for form in ("dual", "rectified", "barrier"):
        one = ConstrainedDPO(dual=0.3, constraint=form)  # type: ignore[arg-type]
        one.update(1.0)
        other = ConstrainedDPO(dual=0.3, constraint=form)  # type: ignore[arg-type]
        other.load_state_dict(one.state_dict())
        assert other.update(0.7) == one.update(0.7)


def test_an_expected_cost_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="expected_cost"):
        ConstrainedDPO(constraint="rectified").update(0.0, math.nan)
