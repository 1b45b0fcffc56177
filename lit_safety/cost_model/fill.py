"""Costs for pairs whose shard has none: from a cost model, once a pair, or from their labels."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_safety.core.errors import UserError

if TYPE_CHECKING:
    from lit_safety.cost_model.network import CostScorer
    from lit_safety.data.reading.batch import PairBatch
    from lit_safety.data.reading.groups import Groups


def fill_costs(batch: PairBatch, scorer: CostScorer, memory: dict[str, tuple[float, ...]]) -> PairBatch:
    """The batch with the costs that it lacks; known ones stay, and the batch given is not changed.

    Costs do not depend on what is trained, so each pair goes through the cost model once and is remembered. A mirrored
    pair keeps the costs of its first showing.

    Args:
        batch: pairs, some of them perhaps without costs.
        scorer: gives the costs; on the batch's device is fastest.
        memory: key -> costs of chosen and rejected (of a group: of all images); give the same one for every batch of a
            set of shards, and another for another set, where a key may name another pair.

    Raises:
        UserError: a pair without costs has no images either, or the cost model's answer is not a finite number.
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
        return None if held is None else held[row, : batch.groups.sizes[row]]
    if batch.chosen is None or batch.rejected is None:
        return None
    return torch.stack([batch.chosen[row], batch.rejected[row]])


def _scored(batch: PairBatch, rows: list[int], scorer: CostScorer) -> list[Tensor]:
    """Costs (2,) of chosen and rejected of each of these rows, or (n,) of a group's images, on the CPU."""
    images = [one for row in rows if (one := _images(batch, row)) is not None]
    if len(images) < len(rows):
        raise UserError(
            f"sample {batch.keys[rows[0]]} has neither costs nor images to score: run `shards score` before its "
            "latents are cached"
        )
    # A pair by itself, whatever batch it came in: the last digits depend on what goes through a network together, and a
    # run that was resumed meets a pair in another batch first.
    costs = [scorer.costs(one).float().cpu() for one in images]
    for row, own in zip(rows, costs, strict=True):
        if not own.isfinite().all():
            raise UserError(f"sample {batch.keys[row]}: its cost is not finite; look at it with `shards inspect`")
    return costs


def costs_of_labels(batch: PairBatch) -> PairBatch:
    """The batch with 1 and -1 for the costs that it lacks: harmful and safe. The batch given is not changed.

    Args:
        batch: B pairs. Known costs stay.

    Raises:
        UserError: a pair has no costs, a label of it is not known, and safety did not decide its order.
    """
    groups = batch.groups
    for key, cost, label, order in zip(batch.keys, batch.has_cost, batch.has_harmful, batch.orders, strict=True):
        if not (cost or label or (order == "safety" and groups is None)):
            raise UserError(
                f"sample {key} has no costs, its label is not known, and its order is {order}: `label_costs` cannot "
                "say how harmful its images are; label both, or leave such pairs out with `data.init_args.orders`"
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
