"""Where a run stands in the data: (pass, batches consumed), right whenever a checkpoint can be written.

The epoch that Lightning hands to samplers is not used: after resuming under `max_steps` from a checkpoint of an
epoch's end, Lightning 2.6 hands out one that is too high. Nor are batches counted as they leave the workers: what a
worker has ahead is not consumed, and a batch whose training step did not end (an exception, a signal) is to be trained
again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import Trainer

from lit_safety.errors import UserError


@dataclass
class Place:
    """The place of one rank's training stream; every rank holds the same numbers."""

    trainer: Trainer | None = None
    """Who consumes; None: whoever iterates, and every batch handed out is consumed."""
    signature: dict[str, int | bool | str] = field(default_factory=dict)
    """What must be equal to resume in the middle of a pass: the YAML key (or words for it) and its value."""
    epoch: int = 0
    """The pass that is under way, or comes next: how many times the data was gone through."""
    first: int = 0
    """Where that pass begins: the batches a resumed run skips."""
    handed: int | None = None
    """Batches of the pass handed out so far, the skipped ones included; None: it has not begun."""

    def begin(self) -> None:
        """A pass begins: the one loaded or the first, else the next."""
        if self.handed is not None:
            self.epoch, self.first = self.epoch + 1, 0
        self.handed = self.first

    def hand_out(self) -> None:
        assert self.handed is not None
        self.handed += 1

    def state_dict(self) -> dict[str, Any]:
        epoch, consumed = self._now()
        return {"epoch": epoch, "consumed": consumed, "signature": dict(self.signature)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a checkpoint's place.

        Raises:
            UserError: it lies within a pass over other data or with other batches.
        """
        made_with = state["signature"]
        for name, value in self.signature.items():
            if state["consumed"] and made_with.get(name) != value:
                raise UserError(
                    "the checkpoint was written in the middle of a pass over the data with "
                    f"{name} = {made_with.get(name)}, but it is {value} now; resume with the same, or start a new run"
                )
        self.epoch, self.first, self.handed = state["epoch"], state["consumed"], None

    def _now(self) -> tuple[int, int]:
        if self.handed is None:
            return self.epoch, self.first
        if self.trainer is None:
            return self.epoch, self.handed
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        in_flight = progress.current.ready - progress.current.processed  # type: ignore[attr-defined]
        consumed = self.handed - in_flight
        # A module may end a pass early, so the count alone does not tell; and before a new pass's first batch
        # Lightning has forgotten already that the one before was over, so its flag alone does not either.
        over = self.trainer.is_last_batch and not in_flight
        if over or consumed >= self.trainer.num_training_batches:
            return self.epoch + 1, 0
        return self.epoch, consumed
