"""A progress bar that counts batches against batches, also where several of them make a step."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import ProgressBar


def count_batches(bar: Any) -> None:
    """Mend the total of any of Lightning's bars, which counts the steps that are left as if each were one batch."""
    if isinstance(bar, ProgressBar):
        bar.__class__ = type(type(bar).__name__, (_WholeBatches, type(bar)), {"__module__": type(bar).__module__})


class _WholeBatches(ProgressBar):
    @property
    def total_train_batches(self) -> int | float:
        """Batches of this epoch, those before a resume included; fewer where the run ends within it."""
        trainer = self.trainer
        held, every = trainer.num_training_batches, trainer.accumulate_grad_batches
        if trainer.max_epochs not in (-1, None) or trainer.max_steps is None or trainer.max_steps < 0:
            return held
        begun = trainer.fit_loop.epoch_loop.batch_progress.current.completed
        left = max(0, trainer.max_steps - trainer.global_step) * every - begun % every
        return min(held, begun + left)
