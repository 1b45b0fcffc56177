"""The loader that a trainer iterates: worker processes in, batches out, and where the run stands."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from lit_safety.data.ahead import ReadAhead
from lit_safety.data.batch import PairBatch
from lit_safety.data.place import Place
from lit_safety.data.stream import Failure, PairStream
from lit_safety.errors import UserError

log = logging.getLogger(__name__)


class PairLoader:
    """Batches of one rank, pass after pass.

    It is no `torch.utils.data.DataLoader` (it makes one for each pass), so that Lightning hands it through
    untouched: no sampler to replace, no length of an `IterableDataset` to doubt.

    Args:
        stream: the rank's batches.
        num_workers: worker processes.
        pin_memory: hand batches over in page-locked memory.
        place: where the run stands; None: every pass is the whole of epoch 0 (validation, test).
        bad_sample_limit: with `skip_bad`, stop when more samples than this have been left out.
        bad_samples: what was left out so far (name and reason each), shared with the other loaders of a run.
    """

    def __init__(
        self,
        stream: PairStream,
        num_workers: int = 0,
        pin_memory: bool = False,
        place: Place | None = None,
        bad_sample_limit: int = 0,
        bad_samples: dict[str, None] | None = None,
    ) -> None:
        self.stream = stream
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.place = place
        self.bad_sample_limit = bad_sample_limit
        self.bad_samples = {} if bad_samples is None else bad_samples

    def __len__(self) -> int:
        """Batches in a whole pass."""
        return self.stream.batches

    def __iter__(self) -> Iterator[PairBatch]:
        # A generator: nothing happens until the first batch is asked for. Lightning makes iterators that it
        # drops.
        place = self.place or Place()
        place.begin()
        left = len(self) - place.first
        workers = DataLoader(
            self.stream.at(place.epoch, place.first),
            batch_size=None,
            num_workers=min(self.num_workers, max(left, 0)),
            pin_memory=self.pin_memory,
        )
        # Workers are started here and not in the thread. Without any, the thread would read where the step computes.
        ahead = ReadAhead(iter(workers)) if workers.num_workers else None
        try:
            for batch in ahead or workers:
                if isinstance(batch, Failure):
                    raise UserError(batch.message)
                self._note(batch.skipped)
                place.hand_out()
                yield batch
        finally:
            if ahead is not None:
                ahead.close()

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
        """The place in the data, for Lightning's checkpoints."""
        return {} if self.place is None else self.place.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.place is not None and state:
            self.place.load_state_dict(state)
