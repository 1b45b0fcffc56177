"""What each batch of a pass is made of: the pairs as one group, or groups that take turns.

Groups are for training one expert a category: a step (all micro-batches of all ranks) belongs to one group, and which
group's turn it is is a pure function of (seed, epoch) and the counts, so every rank agrees without a word. Each group
has its own order and gets as many turns as it has pairs for; the turns are shuffled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lit_safety.data.order import Deal, EpochOrder, permutation
from lit_safety.data.select import Selection


@dataclass(frozen=True)
class Group:
    """Pairs that are batched with each other."""

    selection: Selection
    category: str | None = None
    """What they have in common; None: nothing is asked of them."""


@dataclass(frozen=True)
class Draw:
    """Where a batch's pairs come from."""

    group: int
    start: int
    """Positions [start, stop) of the group's order."""
    stop: int


def batches_in(groups: Sequence[Group], deal: Deal) -> int:
    """How many batches each rank gets in a pass; the same in every pass."""
    return sum(deal.batches(group.selection.total) for group in groups)


class Plan:
    """The batches of one pass over the data for one rank.

    Args:
        groups: one, or several that take turns.
        deal: how positions are dealt to this rank.
        seed: the run's seed; None keeps the stored order (one group only).
        epoch: which pass over the data this is.
        window: how many shards are mixed with each other.
    """

    def __init__(self, groups: Sequence[Group], deal: Deal, seed: int | None, epoch: int, window: int) -> None:
        self.groups = groups
        self.deal = deal
        self.orders = [EpochOrder(one.selection.counts, seed, epoch, window, one.category) for one in groups]
        self.batches = batches_in(groups, deal)
        steps = [deal.batches(order.total) // deal.accumulate for order in self.orders]
        if len(groups) > 1 and seed is not None:
            turns = np.repeat(np.arange(len(groups)), steps)
            self._turns = turns[permutation(len(turns), "turns", seed, epoch)]
            self._nth = np.empty_like(self._turns)
            """For each step, how many turns its group had before."""
            for group, number in enumerate(steps):
                self._nth[self._turns == group] = np.arange(number)

    def draw(self, batch: int) -> Draw:
        """What this rank's `batch`-th batch is made of."""
        group, local = 0, batch
        if len(self.groups) > 1:
            step, micro = divmod(batch, self.deal.accumulate)
            group, local = int(self._turns[step]), int(self._nth[step]) * self.deal.accumulate + micro
        return Draw(group, *self.deal.span(local, self.orders[group].total))
