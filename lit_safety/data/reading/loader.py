"""The loader that a trainer iterates: batches that worker processes make."""

from __future__ import annotations

import copy
import logging
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lit_safety.core.errors import UserError
from lit_safety.data.format.tar_index import BadSample, OpenShard
from lit_safety.data.reading.batch import Pair, PairBatch, collate
from lit_safety.data.reading.decode import PairDecoder
from lit_safety.data.reading.order import (
    Deal,
    Draw,
    EpochOrder,
    Group,
    MixedPlan,
    Plan,
    Window,
    batches_in,
    mixed_batches,
)
from lit_safety.data.reading.position import DataPosition
from lit_safety.data.reading.select import Selection
from lit_safety.data.reading.source import Source


@dataclass(frozen=True)
class Failure:
    """A user's error that is passed out of a worker process, where an exception would become a torch traceback."""

    message: str


class PairStream(IterableDataset):
    """This rank's batches of one pass over the data, from `first` on.

    Worker w of W makes the batches first + w, first + w + W, ..., which is the order in which a DataLoader asks its
    workers, so the stream does not depend on W. A bad sample is an error, or with `skip_bad` it is left out: in
    training the next good sample of its window replaces it (so batches keep their size and ranks stay in
    step), in evaluation the batch is smaller.

    Args:
        source: the shards.
        groups: the used samples: one group, or several that take turns.
        deal: how the global order is dealt to this rank.
        decoder: how a sample becomes tensors.
        shuffle: False keeps the stored order, and every pass has the seeds of epoch 0 (validation, test).
        window: how many shards are mixed with each other.
        skip_bad: leave bad samples out instead of stopping.
        steps_each: the groups come one after the other, each for so many steps; None: they take turns.
        weights: every batch holds pairs of all groups, in this proportion; None: a batch holds one group.
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
        steps_each: int | None = None,
        weights: Sequence[float] | None = None,
    ) -> None:
        self.source = source
        self.groups = groups
        self.deal = deal
        self.decoder = decoder
        self.shuffle = shuffle
        self.window = window
        self.skip_bad = skip_bad
        self.steps_each = steps_each
        self.weights = weights
        self.epoch = 0
        self.first = 0

    @property
    def batches(self) -> int:
        """Batches in a whole pass, the same in each."""
        if self.weights is not None:
            return mixed_batches(self.groups, self.deal)
        return batches_in(self.groups, self.deal, self.steps_each)

    def at(self, epoch: int, first: int) -> PairStream:
        """A copy of the stream that begins at a batch; the stream of running workers does not change."""
        placed = copy.copy(self)
        placed.epoch, placed.first = (epoch if self.shuffle else 0), first
        return placed

    def __iter__(self) -> Iterator[PairBatch | Failure]:
        worker = get_worker_info()
        start, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        seed, window = (self.decoder.seed, self.window) if self.shuffle else (None, 1)
        plan: Plan | MixedPlan
        if self.weights is None:
            plan = Plan(self.groups, self.deal, seed, self.epoch, window, self.steps_each)
        else:
            plan = MixedPlan(self.groups, self.weights, self.deal, seed, self.epoch, window)
        shards = _Shards(self.source, self.skip_bad)
        readers = [_Reader(self, group, shards) for group in self.groups]
        try:
            for number in range(self.first + start, plan.batches, step):
                yield self._batch(readers, plan, number)
        except UserError as error:
            yield Failure(str(error))
        finally:
            shards.close()

    def _batch(self, readers: Sequence[_Reader], plan: Plan | MixedPlan, number: int) -> PairBatch:
        skipped: list[str] = []
        pairs: list[Pair] = []
        draws = plan.draws(number)
        for draw in draws:
            pairs += readers[draw.group].read(draw, plan.order(draw), skipped)
        if not pairs:
            raise UserError(f"all samples for a batch are bad; the first: {skipped[0]}")
        return collate(pairs, self.groups[draws[0].group].category, skipped, self.decoder.empty())


class _Passes(IterableDataset):
    """The stream as worker processes hold it that live longer than a pass.

    Where a pass begins stands in memory that they share with the training process. They look there when a pass begins.

    Args:
        stream: the batches of a pass.
        shared: whether there are worker processes.
    """

    def __init__(self, stream: PairStream, shared: bool) -> None:
        self._stream = stream
        self._begins = torch.zeros(2, dtype=torch.int64)
        if shared:
            self._begins.share_memory_()

    def begin(self, epoch: int, first: int) -> None:
        """From now on, iterators are of this pass, from this batch on."""
        self._begins.copy_(torch.tensor([epoch, first]))

    def __iter__(self) -> Iterator[PairBatch | Failure]:
        epoch, first = self._begins.tolist()
        return iter(self._stream.at(epoch, first))


class _Shards:
    """The open shards, which the readers of all groups share."""

    def __init__(self, source: Source, skip_bad: bool) -> None:
        self._source = source
        self._skip_bad = skip_bad
        self._open: dict[int, OpenShard] = {}
        self._users: dict[int, set[int]] = {}

    def enter(self, reader: int, window: Window) -> None:
        """Move a reader to a window. Shards that are in no reader's window any more are closed."""
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

    _order: EpochOrder
    _epoch: int

    def __init__(self, stream: PairStream, group: Group, shards: _Shards) -> None:
        self._stream = stream
        self._selection: Selection = group.selection
        self._size = group.size
        self._shards = shards
        self._window: Window | None = None
        self._samples: NDArray[np.int64]

    def read(self, draw: Draw, order: EpochOrder, skipped: list[str]) -> list[Pair]:
        """The pairs at a draw's positions. Bad samples that are left out are added to `skipped`."""
        if self._window is None or order is not self._order:
            self._window, self._order, self._epoch = None, order, draw.epoch
        read = [self._pair(position, skipped) for position in range(draw.start, draw.stop)]
        return [pair for pair in read if pair is not None]

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
        key, members = tar.read(number, self._stream.decoder.wants)
        where = tar.where(number)
        pair = self._stream.decoder(key, members, self._epoch, where, self._size)
        self._stream.source.check(shard, number, pair.metadata, where)
        return pair


T = TypeVar("T")

log = logging.getLogger(__name__)


class PairLoader:
    """Batches of one rank, pass after pass.

    It is not a `torch.utils.data.DataLoader` (it holds one), so that Lightning does not change it: it has no sampler to
    replace, and its length causes no warning about an `IterableDataset`.

    Worker processes are started for the first pass and wait for the next one: where processes do not begin as copies
    (`spawn`, `forkserver`), each start imports torch again. They stop when Lightning is done with the loader, when the
    loader is dropped or closed, or after an error.

    Args:
        stream: the rank's batches.
        num_workers: worker processes.
        pin_memory: hand batches over in page-locked memory.
        position: where the run is in the data; None: every pass is the whole of epoch 0 (validation, test).
        bad_sample_limit: with `skip_bad`, stop when more samples than this have been left out.
        bad_samples: the samples left out so far (name and reason each), shared with the other loaders of a run.
    """

    def __init__(
        self,
        stream: PairStream,
        num_workers: int = 0,
        pin_memory: bool = False,
        position: DataPosition | None = None,
        bad_sample_limit: int = 0,
        bad_samples: dict[str, None] | None = None,
    ) -> None:
        self.stream = stream
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.position = position
        self.bad_sample_limit = bad_sample_limit
        self.bad_samples = {} if bad_samples is None else bad_samples
        self._waiting: DataLoader | None = None
        """Workers between two passes."""

    def __len__(self) -> int:
        """Batches in a whole pass."""
        return self.stream.batches

    def __iter__(self) -> Iterator[PairBatch]:
        # A generator: it starts with the first batch, because Lightning also makes iterators that it never uses.
        position = self.position or DataPosition()
        position.begin()
        workers = self._workers()
        passes: Any = workers.dataset
        passes.begin(position.epoch, position.first)
        # Workers are started here and not in the thread. Without workers the thread would read in the training process.
        batches = iter(workers)
        reader = ReadAhead(batches) if workers.num_workers else None
        whole = False
        try:
            for batch in reader or batches:
                if isinstance(batch, Failure):
                    raise UserError(batch.message)
                self._note(batch.skipped)
                position.hand_out()
                yield batch
            whole = True
        except GeneratorExit:  # the pass is left early: what its workers still make is dropped when the next begins
            whole = True
            raise
        finally:
            if reader is not None:
                reader.close()
                if whole and self._waiting is None:
                    self._waiting = workers
                else:
                    _stop(workers)

    def _workers(self) -> DataLoader:
        """The workers that wait, or new ones."""
        workers, self._waiting = self._waiting, None
        if workers is not None:
            # As for new workers, torch draws a seed: what draws from its global generator in a step must not depend on
            # where batches are made.
            torch.empty((), dtype=torch.int64).random_()
            return workers
        count = min(self.num_workers, len(self))
        return DataLoader(
            _Passes(self.stream, count > 0),
            batch_size=None,
            num_workers=count,
            pin_memory=self.pin_memory,
            persistent_workers=count > 0,
        )

    # By this name Lightning stops a loader's workers at the end of a fit, also of one that fails.
    @property
    def _iterator(self) -> Any:
        return None if self._waiting is None else self._waiting._iterator

    @_iterator.setter
    def _iterator(self, stopped: None) -> None:
        self._waiting = stopped

    def close(self) -> None:
        """Stop the workers that wait for another pass; one more pass would start new ones."""
        workers, self._waiting = self._waiting, None
        if workers is not None:
            _stop(workers)

    def __del__(self) -> None:
        self.close()

    def _note(self, skipped: list[str]) -> None:
        for message in skipped:
            if message not in self.bad_samples:
                self.bad_samples[message] = None
                log.warning("left out a bad sample: %s", message)
        if len(self.bad_samples) > self.bad_sample_limit:
            raise UserError(
                f"{len(self.bad_samples)} bad samples were left out, more than data.init_args.bad_sample_limit = "
                f"{self.bad_sample_limit}; the last: {next(reversed(self.bad_samples))}"
            )

    def state_dict(self) -> dict[str, Any]:
        """The position in the data, for Lightning's checkpoints."""
        return {} if self.position is None else self.position.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.position is not None and state:
            self.position.load_state_dict(state)


def _stop(workers: DataLoader) -> None:
    """Stop worker processes. Torch keeps them for passes to come until its own iterator is told."""
    if workers._iterator is not None:
        workers._iterator._shutdown_workers()  # type: ignore[attr-defined]


_END = object()


class ReadAhead(Iterator[T]):
    """Hands out the items of `source`. A thread reads up to `count` of them in advance.

    Taking a batch from a worker process costs a few milliseconds of unpacking. With the thread this happens during a
    step and not between two steps. `close` (or the end, or an error) stops the thread; until then no other code may
    read `source`.

    Args:
        source: read in the thread from now on.
        count: how many are read in advance.
    """

    def __init__(self, source: Iterator[T], count: int = 2) -> None:
        self._source = source
        self._ready: queue.Queue[Any] = queue.Queue(count)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._read, name="read-ahead", daemon=True)
        self._thread.start()

    def __next__(self) -> T:
        if self._closed.is_set():
            raise StopIteration
        found, error = self._ready.get()
        if found is not _END:
            return found
        self.close()
        if error is not None:
            raise error
        raise StopIteration

    def close(self) -> None:
        """Stop the thread and wait for it. Batches that it holds are dropped."""
        self._closed.set()
        while self._thread.is_alive():
            try:  # it may wait for space in the queue
                self._ready.get_nowait()
            except queue.Empty:
                self._thread.join(0.01)

    def _read(self) -> None:
        failed: BaseException | None = None
        try:
            for item in self._source:
                self._ready.put((item, None))
                if self._closed.is_set():
                    return
        except BaseException as error:  # the reading side raises it again
            failed = error
        self._ready.put((_END, failed))
