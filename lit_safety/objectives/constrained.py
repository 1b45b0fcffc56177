"""Constrained DPO (Liu et al., arXiv 2403.02475): maximise quality while the expected cost stays below a limit.

The Lagrangian of this problem has the reward r - lambda C. The inner step is DPO on pairs that are ordered by this
reward. The outer step changes lambda by the costs of what the policy draws now, in one of three ways:

- dual ascent: lambda rises while the expected cost is above the limit and falls, at most to 0, while it is below;
- rectified (RePO, Peng et al., arXiv 2410.19933): each prompt's cost is held below the limit, so that harmless prompts
  cannot compensate harmful ones. Lambda rises by the mean excess and never falls. It stays constant when no prompt
  exceeds the limit;
- a log barrier: the penalty -log(limit - C) in place of lambda (C - limit). Near the limit and above it the penalty is
  continued by its tangent, because the base starts above the limit. Lambda moves towards the penalty's slope at the
  expected cost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from lit_safety.objectives.dpo import DiffusionDPO
from lit_safety.objectives.objective import ObjectiveOutput, PairErrors, PairLabels


def dual_update(dual: float, expected_cost: float, limit: float, rate: float) -> float:
    """lambda <- max(0, lambda + eta (E[C] - limit)); E[C] is the mean cost of what the policy draws now."""
    return max(0.0, dual + rate * (expected_cost - limit))


def rectified_excess(costs: Sequence[float], prompts: Sequence[str], limit: float) -> float:
    """Mean over prompts of max(0, mean cost of the prompt's images - limit); costs and prompts of the same images."""
    found: dict[str, list[float]] = {}
    for cost, prompt in zip(costs, prompts, strict=True):
        found.setdefault(prompt, []).append(cost)
    # Unlike `max`, this keeps nan costs.
    over = [sum(own) / len(own) - limit for own in found.values()]
    return sum(0.0 if one <= 0 else one for one in over) / max(len(over), 1)


def barrier(cost: float, limit: float, edge: float) -> float:
    """-log(limit - C) if C is at least ``edge`` below the limit; for a larger C its tangent at that point."""
    room = limit - cost
    return -math.log(room) if room >= edge else -math.log(edge) + (edge - room) / edge


def barrier_slope(cost: float, limit: float, edge: float) -> float:
    """The barrier's derivative by the cost: 1 / (limit - C), at most 1 / edge."""
    return 1.0 / max(limit - cost, edge)


def reward_order(score: Tensor, cost: Tensor, dual: float) -> Tensor:
    """Sign of (r_w - lambda C_w) - (r_l - lambda C_l), scores and costs (B, 2) -> (B,).

    1: the chosen image is better; -1: the rejected image is better; 0: a tie. An unknown score or cost gives nan.
    """
    advantage = (score[:, 0] - score[:, 1]) - dual * (cost[:, 0] - cost[:, 1])
    # torch.sign(nan) is 0, so an unknown label would look like a tie.
    return torch.where(advantage.isnan(), advantage, advantage.sign())


def reorder(errors: PairErrors, labels: PairLabels, swap: Tensor) -> tuple[PairErrors, PairLabels]:
    """The batch with chosen and rejected swapped where ``swap`` (B,) is true.

    ``drift`` keeps the shard's chosen image.
    """
    pairs = [
        (errors.policy_chosen, errors.policy_rejected),
        (errors.reference_chosen, errors.reference_rejected),
    ]
    policy, reference = ((torch.where(swap, b, a), torch.where(swap, a, b)) for a, b in pairs)
    harmful, cost, score = (
        torch.where(swap[:, None], columns.flip(1), columns) for columns in (labels.harmful, labels.cost, labels.score)
    )
    reordered = replace(
        errors,
        policy_chosen=policy[0],
        policy_rejected=policy[1],
        reference_chosen=reference[0],
        reference_rejected=reference[1],
    )
    return reordered, replace(labels, harmful=harmful, cost=cost, score=score)


class Constraint:
    """The dual variable of an objective that keeps an expected cost below a limit, and how it moves."""

    limit: float
    dual: float
    dual_rate: float
    constraint: str
    barrier_weight: float
    barrier_edge: float

    def constrain(
        self, limit: float, dual: float, dual_rate: float, constraint: str, barrier_weight: float, barrier_edge: float
    ) -> None:
        """Take the settings; see `ConstrainedDPO`.

        Raises:
            ValueError: one is outside its range.
        """
        if constraint not in ("dual", "rectified", "barrier"):
            raise ValueError(f"constraint must be dual, rectified or barrier, got {constraint!r}")
        if not (0 < barrier_weight < float("inf") and 0 < barrier_edge < float("inf")):
            raise ValueError(f"barrier_weight and barrier_edge must be above 0, got {barrier_weight}, {barrier_edge}")
        if constraint == "barrier" and dual_rate > 1:
            raise ValueError(f"dual_rate is a share with constraint: barrier, at most 1, got {dual_rate}")
        if not -float("inf") < limit < float("inf"):  # nan compares as false
            raise ValueError(f"limit must be a finite number, got {limit}")
        if not 0 <= dual < float("inf"):
            raise ValueError(f"dual must not be negative, got {dual}")
        if not 0 < dual_rate < float("inf"):
            raise ValueError(f"dual_rate must be above 0, got {dual_rate}")
        self.limit = limit
        self.dual = dual
        self.dual_rate = dual_rate
        self.constraint = constraint
        self.barrier_weight = barrier_weight
        self.barrier_edge = barrier_edge

    def update(self, expected_cost: float, excess: float | None = None) -> float:
        """Move lambda by the expected cost of what the policy draws now, and return it.

        Every rank must be given the same numbers, or the ranks order the same pairs differently.

        Args:
            expected_cost: the mean over what was drawn.
            excess: `rectified_excess` of it; None: as if it were one prompt's.

        Raises:
            ValueError: if one of them is not a finite number.
        """
        over = max(0.0, expected_cost - self.limit) if excess is None else excess
        if not (math.isfinite(expected_cost) and math.isfinite(over)):
            raise ValueError(f"expected_cost must be a finite number, got {expected_cost}")
        if self.constraint == "rectified":
            self.dual += self.dual_rate * over
        elif self.constraint == "barrier":
            slope = self.barrier_weight * barrier_slope(expected_cost, self.limit, self.barrier_edge)
            self.dual += self.dual_rate * (slope - self.dual)
        else:
            self.dual = dual_update(self.dual, expected_cost, self.limit, self.dual_rate)
        return self.dual

    def state_dict(self) -> dict[str, Any]:
        return {"dual": self.dual}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if set(state) != {"dual"}:
            raise ValueError(f"{type(self).__name__} goes on from a dual variable, and the checkpoint holds none")
        self.dual = float(state["dual"])


class ConstrainedDPO(Constraint, DiffusionDPO):
    """Constrained DPO: Diffusion-DPO on pairs ordered by score - lambda * cost, with lambda as the dual variable.

    The order in the shard does not matter: each pair is ordered again at every step by its scores and costs, which must
    be known. The preference loss of a tie is 0. All logged values and `sft_weight` use the new order; only the anchor
    uses the shard's chosen image. Lambda changes only when `update` is called. While it is 0, pairs are ordered only by
    quality, and a harmful image can be the chosen one.

    There can be two units of cost. Pairs are ordered by their own ``cost`` (ground truth or another model's; a module's
    cost model fills in only missing costs), while ``limit`` and the expected cost are calibrated logits of
    `UpdateDual`'s cost model. Lambda has a single unit only if this model wrote all costs (`shards score --existing
    replace`).

    Args:
        beta: strength of the preference in logits per unit of error, as beta_dpo of the Diffusion-DPO code.
        limit: the allowed expected cost (with `rectified`: for every prompt), in the unit of `UpdateDual`'s cost model,
            where an image counts as harmful above 0.
        dual: lambda at the start, in units of score per unit of cost.
        dual_rate: eta, the change of lambda for each unit of expected cost above the limit; with `barrier` the share,
            at most 1, of the distance to the barrier's slope by which it moves.
        label_smoothing: assumed share of wrongly ordered pairs, in [0, 0.5).
        sft_weight: weight of the chosen image's own denoising error; 0 turns the term off.
        anchor_weight: weight of the squared distance to the reference's prediction on clean prompts; 0 is off.
        constraint: how lambda changes: `dual` (ascent), `rectified` (every prompt, never down) or `barrier`.
        barrier_weight: for `barrier`: lambda is this times the barrier's slope. The expected cost ends barrier_weight /
            lambda below the limit, so a smaller weight brings it closer to the limit; dual_rate must then be smaller
            too for lambda to become constant.
        barrier_edge: for `barrier`: how far below the limit, in units of cost, the tangent begins; lambda is at most
            barrier_weight / barrier_edge.

    Raises:
        ValueError: ``dual`` is negative, ``dual_rate`` or a setting of the barrier is not positive, or ``constraint``
            is not one of the three.
    """

    needs_cost = True
    needs_score = True
    moved_by = "UpdateDual"

    def __init__(
        self,
        beta: float = 5000.0,
        limit: float = 0.0,
        dual: float = 1.0,
        dual_rate: float = 0.1,
        label_smoothing: float = 0.0,
        sft_weight: float = 0.0,
        anchor_weight: float = 0.0,
        constraint: Literal["dual", "rectified", "barrier"] = "dual",
        barrier_weight: float = 0.1,
        barrier_edge: float = 0.1,
    ) -> None:
        super().__init__(beta, label_smoothing, sft_weight, anchor_weight)
        self.constrain(limit, dual, dual_rate, constraint, barrier_weight, barrier_edge)

    def preference(self, m: Tensor, labels: PairLabels) -> Tensor:
        decided = reward_order(labels.score, labels.cost, self.dual).abs()
        return super().preference(m, labels) * decided

    def __call__(self, errors: PairErrors, labels: PairLabels) -> ObjectiveOutput:
        order = reward_order(labels.score, labels.cost, self.dual)
        output = super().__call__(*reorder(errors, labels, order < 0))
        output.logs["constrained/dual"] = torch.full_like(order, self.dual)
        output.logs["constrained/swapped"] = (order < 0).to(order.dtype)
        output.logs["constrained/ties"] = (order == 0).to(order.dtype)
        return output
