"""Several sources in given proportions: what each batch of a pass takes from which, as pure functions.

Each source is an endless stream of its own passes, one permuted pass after the other. A pass over the mix takes the
next n_i samples of source i, where the n_i are in proportion to the weights and add up to a whole number of steps, and
goes on in the next pass where it stopped. So a small source comes round more often than a large one, no sample is ever
left out for good, and where a run stands follows from the number of the pass and the batches consumed.
"""

from __future__ import annotations

from collections.abc import Sequence

from lit_safety.data.order import Deal, EpochOrder
from lit_safety.data.plan import Draw, Group


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
        """What this rank's `batch`-th batch is made of: a span of each source's own passes, or two where one ends."""
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
        """The order that the positions of `draw` are of; the same object as long as the source's pass is the same."""
        epoch, order = self._orders.get(draw.group, (None, None))
        if order is None or epoch != draw.epoch:
            counts = self.groups[draw.group].selection.counts
            order = EpochOrder(counts, self.seed, draw.epoch, self.window, f"source {draw.group}")
            self._orders[draw.group] = draw.epoch, order
        return order
