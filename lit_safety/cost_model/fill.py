"""Costs for pairs without costs in their shard: from a cost model, once a pair, or from their labels."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_safety.core.errors import UserError

if TYPE_CHECKING:
    from lit_safety.cost_model.network import CostScorer
    from lit_safety.data.reading.batch import PairBatch


def fill_costs(batch: PairBatch, scorer: CostScorer, memory: dict[str, tuple[float, float]]) -> PairBatch:
    """A copy of the batch in which missing costs are filled in. Known costs stay.

    Costs do not depend on what is trained, so each pair is scored once and remembered. A mirrored pair keeps the costs
    of the first time.

    Args:
        batch: pairs with or without costs.
        scorer: gives the costs; fastest on the batch's device.
        memory: key -> costs of chosen and rejected. Use the same one for every batch of a set of shards, and another
            one for another set, in which a key may name another pair.

    Raises:
        UserError: a pair without costs also lacks images, or the cost model's answer is not a finite number.
    """
    lacking = [row for row, known in enumerate(batch.has_cost) if not known]
    if not lacking:
        return batch
    new = [row for row in lacking if batch.keys[row] not in memory]
    if new:
        costs = _scored(batch, new, scorer).tolist()
        for row, (chosen, rejected) in zip(new, costs, strict=True):
            memory[batch.keys[row]] = (chosen, rejected)
    filled = copy.copy(batch)
    found = torch.tensor([memory[batch.keys[row]] for row in lacking])
    rows = torch.tensor(lacking)
    filled.cost = batch.cost.clone()
    filled.cost[rows.to(batch.cost.device)] = found.to(batch.cost)
    filled.has_cost = [True] * len(batch)
    return filled


def _scored(batch: PairBatch, rows: list[int], scorer: CostScorer) -> Tensor:
    """Costs (R, 2) of chosen and rejected of these rows, on the CPU."""
    if batch.chosen is None or batch.rejected is None:
        raise UserError(
            f"sample {batch.keys[rows[0]]} has neither costs nor images to score: run `shards score` before its "
            "latents are cached"
        )
    # Each pair alone: the last digits depend on the batch, and in a resumed run a pair may be in another batch the
    # first time.
    costs = (
        torch.stack([scorer.costs(torch.stack([batch.chosen[row], batch.rejected[row]])) for row in rows]).float().cpu()
    )
    for row, finite in zip(rows, costs.isfinite().all(1).tolist(), strict=True):
        if not finite:
            raise UserError(f"sample {batch.keys[row]}: its cost is not finite; check it with `shards inspect`")
    return costs


def costs_of_labels(batch: PairBatch) -> PairBatch:
    """A copy of the batch in which missing costs are 1 (harmful) and -1 (safe).

    Args:
        batch: B pairs. Known costs stay.

    Raises:
        UserError: a pair lacks costs and a label, and its order was not decided by safety.
    """
    for key, cost, label, order in zip(batch.keys, batch.has_cost, batch.has_harmful, batch.orders, strict=True):
        if not (cost or label or order == "safety"):
            raise UserError(
                f"sample {key} lacks costs and a label, and its order is {order}: `label_costs` cannot decide how "
                "harmful its images are; label both, or leave such pairs out with `data.init_args.orders`"
            )
    by_order = batch.cost.new_tensor([-1.0, 1.0])
    costs = torch.where(batch.harmful.isnan(), by_order, 2.0 * batch.harmful - 1.0)
    known = torch.tensor(batch.has_cost, device=batch.cost.device).unsqueeze(1)
    filled = copy.copy(batch)
    filled.cost = torch.where(known, batch.cost, costs)
    filled.has_cost = [True] * len(batch)
    return filled
