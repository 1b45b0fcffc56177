"""What each batch of a pass is made of: the pairs as one group, or groups that take turns.

Groups are for training one expert a category, or on pictures of one shape a batch: a step (all micro-batches of all
ranks) belongs to one group, and which group's turn it is is a pure function of (seed, epoch) and the counts, so every
rank agrees without a word. Each group has its own order and gets as many turns as it has pairs for; the turns are
shuffled. Or the groups come one after the other, each for the same number of steps and for as many passes over its own
pairs as that takes. Either way a group's batches are those that it would give alone.
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
    size: tuple[int, int] | None = None
    """Height and width that their pictures are cut to; None: as the decoder has it."""

    @property
    def name(self) -> str | None:
        """Tells its order from those of the other groups; None: there is only one."""
        return self.category if self.size is None else f"{self.size[1]} x {self.size[0]}"


@dataclass(frozen=True)
class Draw:
    """Where a batch's pairs come from."""

    group: int
    start: int
    """Positions [start, stop) of the group's order."""
    stop: int
    epoch: int
    """Which pass over the group's pairs it belongs to."""


def batches_in(groups: Sequence[Group], deal: Deal, steps_each: int | None = None) -> int:
    """How many batches each rank gets in a pass; the same in every pass."""
    if steps_each is not None:
        return len(groups) * steps_each * deal.accumulate
    return sum(deal.batches(group.selection.total) for group in groups)


class Plan:
    """The batches of one pass over the data for one rank.

    Args:
        groups: one, or several that take turns.
        deal: how positions are dealt to this rank.
        seed: the run's seed; None keeps the stored order, one group after the other.
        epoch: which pass over the data this is.
        window: how many shards are mixed with each other.
        steps_each: one group after the other, each for so many steps; None: they take turns.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        deal: Deal,
        seed: int | None,
        epoch: int,
        window: int,
        steps_each: int | None = None,
    ) -> None:
        self.groups = groups
        self.deal = deal
        self.seed = seed
        self.epoch = epoch
        self.window = window
        self.steps_each = steps_each
        self.batches = batches_in(groups, deal, steps_each)
        self._orders: dict[int, tuple[int, EpochOrder]] = {}
        if steps_each is None:
            self._take_turns()

    def _take_turns(self) -> None:
        steps = [self.deal.batches(one.selection.total) // self.deal.accumulate for one in self.groups]
        turns = np.repeat(np.arange(len(self.groups)), steps)
        if self.seed is not None and len(self.groups) > 1:
            turns = turns[permutation(len(turns), "turns", self.seed, self.epoch)]
        self._turns = turns
        self._nth = np.empty_like(turns)
        """For each step, how many turns its group had before."""
        for group, number in enumerate(steps):
            self._nth[turns == group] = np.arange(number)

    def draw(self, batch: int) -> Draw:
        """What this rank's `batch`-th batch is made of."""
        accumulate = self.deal.accumulate
        if self.steps_each is None:
            step, micro = divmod(batch, accumulate)
            group, local, epoch = int(self._turns[step]), int(self._nth[step]) * accumulate + micro, self.epoch
        else:
            group, rest = divmod(batch, self.steps_each * accumulate)
            a_pass = self.deal.batches(self.groups[group].selection.total)
            passes, local = divmod(rest, a_pass)
            epoch = self.epoch * -(-self.steps_each * accumulate // a_pass) + passes
        return Draw(group, *self.deal.span(local, self.groups[group].selection.total), epoch)

    def draws(self, batch: int) -> list[Draw]:
        """`draw`, as the one part that the batch is made of."""
        return [self.draw(batch)]

    def order(self, draw: Draw) -> EpochOrder:
        """The order that the positions of `draw` are of; the same object as long as the group's pass is the same."""
        epoch, order = self._orders.get(draw.group, (None, None))
        if order is None or epoch != draw.epoch:
            one = self.groups[draw.group]
            order = EpochOrder(one.selection.counts, self.seed, draw.epoch, self.window, one.name)
            self._orders[draw.group] = draw.epoch, order
        return order
