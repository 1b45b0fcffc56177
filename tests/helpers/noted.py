"""Callbacks that write down what a run of the same process did, for tests that look at it afterwards."""

from __future__ import annotations

import resource
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, TQDMProgressBar

#: Each step's learning rate.
RATES: list[float] = []
#: (batches done, batches in all) after every batch.
BAR: list[tuple[int, float]] = []


class NoteRates(Callback):
    """Into `RATES`."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        RATES.append(optimizer.param_groups[0]["lr"])


class NoteBar(TQDMProgressBar):
    """Into `BAR`."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *rest)
        BAR.append((self.train_progress_bar.n, self.train_progress_bar.total))


class FillDisk(Callback):
    """No file grows any more after the first batch; the test gives the limit back."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
