"""Where a run stands in its training data: what a checkpoint keeps of it, and where a resumed run continues."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lit_safety.core.errors import UserError

if TYPE_CHECKING:  # a worker that starts anew need not import Lightning
    from lightning.pytorch import Trainer


@dataclass
class DataPosition:
    """Where one rank's training stream is. Correct at every moment when a checkpoint can be written, and equal on all
    ranks.

    Lightning's epoch for samplers is not used: after resuming under `max_steps` from a checkpoint at an epoch's end,
    Lightning 2.6 gives one that is too high. Batches are also not counted when they leave the workers: a batch that a
    worker holds ready is not consumed, and a batch whose training step did not end (an exception, a signal) must be
    trained again.
    """

    trainer: Trainer | None = None
    """The trainer that consumes; None: each batch counts as consumed when it is handed out."""
    signature: dict[str, int | bool | str] = field(default_factory=dict)
    """Settings that must be equal to resume in the middle of a pass: the YAML key (or words for it) and its value."""
    epoch: int = 0
    """The number of the current pass, or of the next one."""
    first: int = 0
    """The first batch of that pass: a resumed run skips those before it."""
    handed: int | None = None
    """Batches of the pass that were handed out, including the skipped ones; None: it has not begun."""

    def begin(self) -> None:
        """Begin a pass: the loaded one or the first, else the next."""
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
        """Continue where a checkpoint was written.

        Raises:
            UserError: it was written in the middle of a pass over other data or with other batches.
        """
        made_with = state["signature"]
        for name, value in self.signature.items():
            if state["consumed"] and made_with.get(name) != value:
                raise UserError(
                    "the checkpoint was written in the middle of a pass over the data with "
                    f"{name} = {made_with.get(name)}, but now it is {value}; resume with the same value, or start a "
                    "new run"
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
        # A module may end a pass early, so the count alone is not enough. And before a new pass's first batch
        # Lightning has already reset its flag for the end of the pass before, so the flag alone is not enough.
        over = self.trainer.is_last_batch and not in_flight
        if over or consumed >= self.trainer.num_training_batches:
            return self.epoch + 1, 0
        return self.epoch, consumed
