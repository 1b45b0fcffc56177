"""The global order of the samples and how it is dealt to ranks, as pure functions.

For one (seed, epoch) the shards are permuted, `window` consecutive ones of them form a window, and the
samples of a window are permuted together. The windows one after another are the global order s_0 .. s_{N-1},
which does not depend on files, ranks or workers. With batches of B on R ranks, rank r's batch b is
s_{(bR + r)B} s_{(bR + r)B} ... : so batch 8, batch 4 accumulated twice and two ranks of 4 step on the same samples.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lit_safety.data.reading.select import Selection


def permutation(n: int, *words: int | str | None) -> NDArray[np.int64]:
    """A permutation of 0 .. n - 1 that depends only on the words; the same in every release."""
    digest = hashlib.blake2b("/".join(map(str, words)).encode(), digest_size=16).digest()
    # RandomState's streams are frozen by numpy's compatibility policy; Generator's are not.
    state = np.random.RandomState(np.frombuffer(digest, dtype="<u4").astype(np.uint32))
    return state.permutation(n).astype(np.int64)


@dataclass(frozen=True)
class Window:
    """Shards whose samples are mixed with each other."""

    number: int
    shards: tuple[int, ...]
    start: int
    """The global position of its first sample."""
    stop: int


class EpochOrder:
    """The global order of one pass over the data.

    Args:
        counts: how many samples of each shard are used.
        seed: the run's seed; None keeps the stored order (validation, test).
        epoch: which pass over the data this is.
        window: how many shards are mixed with each other.
        name: makes this order different from others of the same seed and pass; None: there is only one.
    """

    def __init__(
        self, counts: Sequence[int], seed: int | None, epoch: int = 0, window: int = 4, name: str | None = None
    ) -> None:
        self.counts = counts
        self.seed = seed
        self.epoch = epoch
        self._words = (seed, epoch) if name is None else (seed, epoch, name)
        shards = [shard for shard, count in enumerate(counts) if count]  # an empty one would make its window smaller
        if seed is not None:
            shards = [shards[number] for number in permutation(len(shards), "shards", *self._words)]
        self.windows: list[Window] = []
        start = 0
        for first in range(0, len(shards), window):
            members = tuple(shards[first : first + window])
            stop = start + sum(counts[shard] for shard in members)
            self.windows.append(Window(len(self.windows), members, start, stop))
            start = stop
        self.total = start
        self._starts = [one.start for one in self.windows]

    def window_at(self, position: int) -> Window:
        """The window that holds a global position.

        Raises:
            IndexError: the position is outside the data.
        """
        if not 0 <= position < self.total:
            raise IndexError(f"position {position} of {self.total}")
        return self.windows[bisect.bisect_right(self._starts, position) - 1]

    def samples(self, window: Window) -> NDArray[np.int64]:
        """The window's samples in order: int64 (n, 2) of (shard, number among the shard's used samples)."""
        parts = [
            np.stack([np.full(self.counts[s], s, dtype=np.int64), np.arange(self.counts[s])], axis=1)
            for s in window.shards
        ]
        listed = np.concatenate(parts)
        if self.seed is None:
            return listed
        return listed[permutation(len(listed), "window", *self._words, window.number)]


@dataclass(frozen=True)
class Deal:
    """How the global order is dealt to ranks in batches.

    Training (`ragged=False`): every rank gets the same number of full batches, a multiple of `accumulate`. The
    remainder at the end of a pass is dropped, a different one in each epoch. Evaluation (`ragged=True`): every
    sample is used, and the last batch may be smaller. Ranks that would have fewer batches repeat batches from the
    beginning, because otherwise the ranks would wait for each other forever.
    """

    batch_size: int
    rank: int = 0
    world: int = 1
    accumulate: int = 1
    ragged: bool = False

    def batches(self, total: int) -> int:
        """How many batches each rank gets of `total` samples."""
        if self.ragged:
            return -(-self._all(total) // self.world)
        return total // (self.batch_size * self.world * self.accumulate) * self.accumulate

    def dropped(self, total: int) -> int:
        """How many samples of a pass are not used."""
        return 0 if self.ragged else total - self.batches(total) * self.batch_size * self.world

    def repeated(self, total: int) -> int:
        """How many batches are dealt a second time."""
        return self.batches(total) * self.world - self._all(total) if self.ragged else 0

    def span(self, batch: int, total: int) -> tuple[int, int]:
        """The global positions [start, stop) of this rank's `batch`-th batch."""
        number = batch * self.world + self.rank
        if self.ragged:
            number %= self._all(total)
        start = number * self.batch_size
        return start, min(start + self.batch_size, total)

    def _all(self, total: int) -> int:
        return -(-total // self.batch_size)


# The contents of each batch of a pass: pairs of one group, or of groups that take turns.
#
# Groups are for training one expert a category, or with images of one shape in each batch: a step (all micro-batches of
# all ranks) belongs to one group. The group of a step is a pure function of (seed, epoch) and the counts, so all ranks
# agree without communication. Each group has its own order and gets as many turns as it has pairs for; the turns are
# shuffled. Or the groups come one after the other, each for the same number of steps and as many passes over its own
# pairs as that needs. In both cases a group's batches are the same as if it were alone.


@dataclass(frozen=True)
class Group:
    """Pairs that are batched with each other."""

    selection: Selection
    category: str | None = None
    """The category that they share; None: any."""
    size: tuple[int, int] | None = None
    """Height and width that their images are cut to; None: as the decoder has it."""

    @property
    def name(self) -> str | None:
        """Makes its order different from those of other groups; None: there is only one."""
        return self.category if self.size is None else f"{self.size[1]} x {self.size[0]}"


@dataclass(frozen=True)
class Draw:
    """Which pairs a batch holds."""

    group: int
    start: int
    """Positions [start, stop) of the group's order."""
    stop: int
    epoch: int
    """The pass over the group's pairs that it belongs to."""


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
        """For each step, how many turns its group had before it."""
        for group, number in enumerate(steps):
            self._nth[turns == group] = np.arange(number)

    def draw(self, batch: int) -> Draw:
        """The pairs of this rank's `batch`-th batch."""
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
        """`draw`, the only part of the batch."""
        return [self.draw(batch)]

    def order(self, draw: Draw) -> EpochOrder:
        """The order to which the positions of `draw` refer; the same object while the group's pass is the same."""
        epoch, order = self._orders.get(draw.group, (None, None))
        if order is None or epoch != draw.epoch:
            one = self.groups[draw.group]
            order = EpochOrder(one.selection.counts, self.seed, draw.epoch, self.window, one.name)
            self._orders[draw.group] = draw.epoch, order
        return order


# Several sources in given proportions: which samples each batch of a pass takes from which source, as pure functions.
#
# Each source is an endless stream of its own passes, one permuted pass after the other. A pass over the mix takes the
# next n_i samples of source i, where the n_i are in proportion to the weights and add up to a whole number of steps.
# The next pass continues there. So a small source is repeated more often than a large one, every sample is used at some
# time, and a run's position follows from the number of the pass and the batches consumed.


def shares(weights: Sequence[float], total: int) -> list[int]:
    """`total` divided in proportion to the weights, in whole numbers (largest remainder; ties: the first).

    >>> shares([2, 1], 8)  # 5.33 and 2.67
    [5, 3]
    """
    exact = [weight * total / sum(weights) for weight in weights]
    whole = [int(one) for one in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (whole[i] - exact[i], i))
    for i in by_remainder[: total - sum(whole)]:
        whole[i] += 1
    return whole


def taken(each: Sequence[int], position: int) -> list[int]:
    """How many of the first `position` samples of a pass come from each source: spread evenly, and exact at its end.

    Source 0 has floor(position * n_0 / N) of them, source 1 its share of what is left, and so on; each count grows by
    0 or 1 from one position to the next.
    """
    left, rest = position, sum(each)
    counts = []
    for share in each:
        count = left * share // rest if rest else 0
        counts.append(count)
        left, rest = left - count, rest - share
    return counts


def mixed_batches(groups: Sequence[Group], deal: Deal) -> int:
    """How many batches each rank gets in a pass; a pass is as long as all sources together."""
    return deal.batches(sum(group.selection.total for group in groups))


class MixedPlan:
    """The batches of one pass over a mix for one rank.

    Args:
        groups: one a source.
        weights: in which proportion they are taken.
        deal: how positions are dealt to this rank.
        seed: the run's seed; None keeps the stored order of each source.
        epoch: which pass over the mix this is.
        window: how many shards of a source are mixed with each other.
    """

    def __init__(
        self, groups: Sequence[Group], weights: Sequence[float], deal: Deal, seed: int | None, epoch: int, window: int
    ) -> None:
        self.groups = groups
        self.deal = deal
        self.seed = seed
        self.epoch = epoch
        self.window = window
        self.batches = mixed_batches(groups, deal)
        self.total = self.batches * deal.batch_size * deal.world
        self.shares = shares(weights, self.total)
        self._orders: dict[int, tuple[int, EpochOrder]] = {}

    def draws(self, batch: int) -> list[Draw]:
        """The parts of this rank's `batch`-th batch: one span of each source's own passes, or two where a pass ends."""
        start, stop = self.deal.span(batch, self.total)
        found = []
        for group, (share, low, high) in enumerate(
            zip(self.shares, taken(self.shares, start), taken(self.shares, stop), strict=True)
        ):
            size = self.groups[group].selection.total
            first, last = self.epoch * share + low, self.epoch * share + high
            while first < last:
                own, local = divmod(first, size)
                until = min(size, local + last - first)
                found.append(Draw(group, local, until, own))
                first += until - local
        return found

    def order(self, draw: Draw) -> EpochOrder:
        """The order to which the positions of `draw` refer; the same object while the source's pass is the same."""
        epoch, order = self._orders.get(draw.group, (None, None))
        if order is None or epoch != draw.epoch:
            counts = self.groups[draw.group].selection.counts
            order = EpochOrder(counts, self.seed, draw.epoch, self.window, f"source {draw.group}")
            self._orders[draw.group] = draw.epoch, order
        return order
