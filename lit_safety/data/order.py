"""The global order of the samples and how it is dealt to ranks, as pure functions.

For one (seed, epoch) the shards are permuted, `window` consecutive ones of them form a window, and the
samples of a window are permuted together; the windows one after another are the global order s_0 .. s_{N-1}.
Nothing here knows of files, ranks or workers. With batches of B on R ranks, rank r's batch b is s_{(bR + r)B}
... : so batch 8, batch 4 accumulated twice and two ranks of 4 step on the same samples.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


def permutation(n: int, *words: int | str | None) -> NDArray[np.int64]:
    """A permutation of 0 .. n - 1 that depends on the words only; the same with every release."""
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
        counts: how many samples of each shard take part.
        seed: the run's seed; None keeps the stored order (validation, test).
        epoch: which pass over the data this is.
        window: how many shards are mixed with each other.
        name: tells this order from others of the same seed and pass; None: there is only one.
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
        """The window's samples in order: int64 (n, 2) of (shard, number among the shard's taking part)."""
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

    Training (`ragged=False`): every rank gets the same number of full batches, a multiple of `accumulate`;
    what is left at the end of a pass is dropped, another remainder in each epoch. Evaluation (`ragged=True`):
    no sample is lost; the last batch may be smaller, and with several ranks the ones that would run short
    repeat batches from the beginning, since ranks with different numbers of batches would wait for each other
    for ever.
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
        """How many samples of a pass no rank gets."""
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
