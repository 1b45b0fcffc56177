"""Costs for pairs without costs in their shard: from a cost model, once a pair, or from their labels."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_safety.core.errors import UserError
from lit_safety.data.reading.batch import PairBatch, to_floats

if TYPE_CHECKING:
    from lit_safety.cost_model.network import CostScorer
    from lit_safety.data.reading.groups import Groups


def fill_costs(batch: PairBatch, scorer: CostScorer, memory: dict[str, tuple[float, ...]]) -> PairBatch:
    """A copy of the batch in which missing costs are filled in. Known costs stay.

    Costs do not depend on what is trained, so each pair is scored once and remembered. A mirrored pair keeps the costs
    of the first time.

    Args:
        batch: pairs with or without costs.
        scorer: gives the costs; fastest on the batch's device.
        memory: key -> costs of chosen and rejected (of a group: of all images). Use the same one for every batch of a
            set of shards, and another one for another set, in which a key may name another pair.

    Raises:
        UserError: a pair without costs also lacks images, or the cost model's answer is not a finite number.
    """
    lacking = [row for row, known in enumerate(batch.has_cost) if not known]
    if not lacking:
        return batch
    new = [row for row in lacking if batch.keys[row] not in memory]
    if new:
        for row, costs in zip(new, _scored(batch, new, scorer), strict=True):
            memory[batch.keys[row]] = tuple(costs.tolist())
    if batch.groups is not None:
        known = batch.groups.cost.clone()
        for row in lacking:
            own = memory[batch.keys[row]]
            known[row, : len(own)] = torch.tensor(own).to(known)
        return _with_costs(batch, batch.groups, torch.where(batch.groups.cost.isnan(), known, batch.groups.cost))
    filled = copy.copy(batch)
    found = torch.tensor([memory[batch.keys[row]] for row in lacking])
    rows = torch.tensor(lacking)
    filled.cost = batch.cost.clone()
    filled.cost[rows.to(batch.cost.device)] = found.to(batch.cost)
    filled.has_cost = [True] * len(batch)
    return filled


def _with_costs(batch: PairBatch, groups: Groups, costs: Tensor) -> PairBatch:
    filled = copy.copy(batch)
    filled.groups = replace(groups, cost=costs)
    filled.cost = costs.gather(1, groups.sides)
    filled.has_cost = [True] * len(batch)
    return filled


def _images(batch: PairBatch, row: int) -> Tensor | None:
    """The images (n, 3, H, W) of a sample."""
    if batch.groups is not None:
        held = batch.groups.images
        return None if held is None else to_floats(held[row, : batch.groups.sizes[row]])
    if batch.chosen is None or batch.rejected is None:
        return None
    return to_floats(torch.stack([batch.chosen[row], batch.rejected[row]]))


def _scored(batch: PairBatch, rows: list[int], scorer: CostScorer) -> list[Tensor]:
    """Costs (2,) of chosen and rejected of each of these rows, or (n,) of a group's images, on the CPU."""
    images = [one for row in rows if (one := _images(batch, row)) is not None]
    if len(images) < len(rows):
        raise UserError(
            f"sample {batch.keys[rows[0]]} has neither costs nor images to score: run `shards score` before its "
            "latents are cached"
        )
    # Each pair alone: the last digits depend on the batch, and in a resumed run a pair may be in another batch the
    # first time.
    costs = [scorer.costs(one).float().cpu() for one in images]
    for row, own in zip(rows, costs, strict=True):
        if not own.isfinite().all():
            raise UserError(f"sample {batch.keys[row]}: its cost is not finite; check it with `shards inspect`")
    return costs


def costs_of_labels(batch: PairBatch) -> PairBatch:
    """A copy of the batch in which missing costs are 1 (harmful) and -1 (safe).

    Args:
        batch: B pairs. Known costs stay.

    Raises:
        UserError: a pair lacks costs and a label, and its order was not decided by safety.
    """
    groups = batch.groups
    for key, cost, label, order in zip(batch.keys, batch.has_cost, batch.has_harmful, batch.orders, strict=True):
        if not (cost or label or (order == "safety" and groups is None)):
            raise UserError(
                f"sample {key} lacks costs and a label, and its order is {order}: `label_costs` cannot decide how "
                "harmful its images are; label both, or leave such pairs out with `data.init_args.orders`"
            )
    if groups is not None:
        of_labels = torch.where(groups.cost.isnan(), 2.0 * groups.harmful - 1.0, groups.cost)
        return _with_costs(batch, groups, of_labels)
    by_order = batch.cost.new_tensor([-1.0, 1.0])
    costs = torch.where(batch.harmful.isnan(), by_order, 2.0 * batch.harmful - 1.0)
    known = torch.tensor(batch.has_cost, device=batch.cost.device).unsqueeze(1)
    filled = copy.copy(batch)
    filled.cost = torch.where(known, batch.cost, costs)
    filled.has_cost = [True] * len(batch)
    return filled
