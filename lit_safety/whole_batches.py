"""A progress bar that counts batches against batches, also where several of them make a step."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar


def count_batches(bar: Any) -> None:
    """Mend the total of any of Lightning's bars, which counts the steps that are left as if each were one batch."""
    if isinstance(bar, ProgressBar):
        bar.__class__ = type(type(bar).__name__, (_WholeBatches, type(bar)), {"__module__": type(bar).__module__})


class _WholeBatches(ProgressBar):
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self._begun:  # a run that goes on within an epoch is not told of its start, which sets the total
            self.on_train_epoch_start(trainer, pl_module)

    @property
    def _begun(self) -> int:
        """Batches of this epoch that were done before a resume."""
        # Not `completed`: a checkpoint of a batch's end is written before that goes up.
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        done: int = progress.processed
        return done if done < self.trainer.num_training_batches else 0  # else they are the epoch's before

    @property
    def total_train_batches(self) -> int | float:
        """Batches of this epoch, those before a resume included; fewer where the run ends within it."""
        trainer = self.trainer
        held, every = trainer.num_training_batches, trainer.accumulate_grad_batches
        if trainer.max_epochs not in (-1, None) or trainer.max_steps is None or trainer.max_steps < 0:
            return held
        left = max(0, trainer.max_steps - trainer.global_step) * every - self._begun % every
        return min(held, self._begun + left)
