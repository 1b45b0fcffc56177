"""The stream of batches one DataLoader worker makes."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from lit_safety.data.batch import Pair, PairBatch, collate
from lit_safety.data.decode import PairDecoder
from lit_safety.data.order import Deal, EpochOrder, Window
from lit_safety.data.plan import Draw, Group, Plan, batches_in
from lit_safety.data.select import Selection
from lit_safety.data.source import Source
from lit_safety.data.tarindex import BadSample, OpenShard
from lit_safety.errors import UserError


@dataclass(frozen=True)
class Failure:
    """A user's error on its way out of a worker process, where an exception would become a torch traceback."""

    message: str


class PairStream(IterableDataset):
    """This rank's batches of one pass over the data, from `first` on.

    Worker w of W makes the batches first + w, first + w + W, ..., which is the order in which a DataLoader asks its
    workers, so the stream does not depend on W. A bad sample is an error, or with `skip_bad` it is left out: in
    training the next good sample of its window takes its place (so batches keep their size and ranks stay in step),
    in evaluation the batch is smaller.

    Args:
        source: the shards.
        groups: the samples of them that take part: one group, or several that take turns.
        deal: how the global order is dealt to this rank.
        decoder: how a sample becomes tensors.
        shuffle: False keeps the stored order, and every pass has the seeds of epoch 0 (validation, test).
        window: how many shards are mixed with each other.
        skip_bad: leave bad samples out instead of stopping.
    """

    def __init__(
        self,
        source: Source,
        groups: Sequence[Group],
        deal: Deal,
        decoder: PairDecoder,
        shuffle: bool = True,
        window: int = 4,
        skip_bad: bool = False,
    ) -> None:
        self.source = source
        self.groups = groups
        self.deal = deal
        self.decoder = decoder
        self.shuffle = shuffle
        self.window = window
        self.skip_bad = skip_bad
        self.epoch = 0
        self.first = 0

    @property
    def batches(self) -> int:
        """Batches in a whole pass, the same in each."""
        return batches_in(self.groups, self.deal)

    def at(self, epoch: int, first: int) -> PairStream:
        """The stream set to a place: a copy, so that a place handed to workers never moves under them."""
        placed = copy.copy(self)
        placed.epoch, placed.first = (epoch if self.shuffle else 0), first
        return placed

    def __iter__(self) -> Iterator[PairBatch | Failure]:
        worker = get_worker_info()
        start, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        seed, window = (self.decoder.seed, self.window) if self.shuffle else (None, 1)
        plan = Plan(self.groups, self.deal, seed, self.epoch, window)
        shards = _Shards(self.source, self.skip_bad)
        readers = [_Reader(self, group, order, shards) for group, order in zip(self.groups, plan.orders, strict=True)]
        try:
            for number in range(self.first + start, plan.batches, step):
                draw = plan.draw(number)
                yield readers[draw.group].batch(draw)
        except UserError as error:
            yield Failure(str(error))
        finally:
            shards.close()


class _Shards:
    """The shards that are open, shared by the readers of all groups."""

    def __init__(self, source: Source, skip_bad: bool) -> None:
        self._source = source
        self._skip_bad = skip_bad
        self._open: dict[int, OpenShard] = {}
        self._users: dict[int, set[int]] = {}

    def enter(self, reader: int, window: Window) -> None:
        """A reader goes over to a window: what no reader's window holds any more is closed."""
        self._users[reader] = set(window.shards)
        wanted = set().union(*self._users.values())
        for shard in [one for one in self._open if one not in wanted]:
            self._open.pop(shard).close()

    def get(self, shard: int) -> OpenShard:
        if shard not in self._open:
            self._open[shard] = self._source.open_shard(shard)
        tar = self._open[shard]
        if tar.problem is not None and not self._skip_bad:
            raise UserError(f"{tar.path}: {tar.problem}; restore the shard, or set on_bad_sample to skip")
        return tar

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()


class _Reader:
    """Reads one group's samples by their position in its order."""

    def __init__(self, stream: PairStream, group: Group, order: EpochOrder, shards: _Shards) -> None:
        self._stream = stream
        self._selection: Selection = group.selection
        self._category = group.category
        self._order = order
        self._shards = shards
        self._window: Window | None = None
        self._samples: NDArray[np.int64]

    def batch(self, draw: Draw) -> PairBatch:
        skipped: list[str] = []
        read = [self._pair(position, skipped) for position in range(draw.start, draw.stop)]
        pairs = [pair for pair in read if pair is not None]
        if not pairs:
            raise UserError(f"no good sample is left for a batch: {skipped[0]}")
        return collate(pairs, self._category, skipped)

    def _pair(self, position: int, skipped: list[str]) -> Pair | None:
        window = self._enter(self._order.window_at(position))
        size = window.stop - window.start
        for ahead in range(size if self._stream.shuffle else 1):
            shard, index = (int(one) for one in self._samples[(position - window.start + ahead) % size])
            try:
                return self._read(shard, self._selection.number(shard, index))
            except BadSample as error:
                if not self._stream.skip_bad:
                    raise
                skipped.append(str(error))
        return None

    def _enter(self, window: Window) -> Window:
        if self._window is None or self._window.number != window.number:
            self._window, self._samples = window, self._order.samples(window)
            self._shards.enter(id(self), window)
        return window

    def _read(self, shard: int, number: int) -> Pair:
        try:
            tar = self._shards.get(shard)
        except UserError as error:
            if not self._stream.skip_bad:
                raise
            raise BadSample(f"sample {number} of {error}") from error
        key, members = tar.read(number)
        return self._stream.decoder(key, members, self._stream.epoch, tar.where(number))
