"""A callback by which a run meets an accident at a chosen step: a signal, a kill, a weight that is not a number."""

from __future__ import annotations

import os
import signal
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from lit_safety.core import files as atomic


class Accident(Callback):
    """Strikes once, on one rank.

    Args:
        kind: `sigterm` and `sigkill` come within a step, `sigterm-validation` within validation; `nan` makes a trained
            weight nan before a step; `full-disk` lets files that are written whole or not at all meet a full disk.
        step: after so many whole optimizer steps.
        rank: whom.
    """

    def __init__(
        self, kind: Literal["sigterm", "sigkill", "sigterm-validation", "nan", "full-disk"], step: int, rank: int = 0
    ) -> None:
        self.kind, self.step, self.rank = kind, step, rank
        self.done = False

    def _due(self, trainer: Trainer) -> bool:
        due = not self.done and trainer.global_step == self.step and trainer.global_rank == self.rank
        self.done = self.done or due
        return due

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.kind == "sigterm-validation" or not self._due(trainer):
            return
        if self.kind == "full-disk":
            atomic._open_own = lambda path: (atomic._own_name(path), open("/dev/full", "wb"))  # noqa: SIM115
        elif self.kind == "nan":
            with torch.no_grad():
                next(p for p in pl_module.parameters() if p.requires_grad).fill_(float("nan"))
        else:
            os.kill(os.getpid(), signal.SIGTERM if self.kind == "sigterm" else signal.SIGKILL)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.kind == "sigterm-validation" and self._due(trainer):
            os.kill(os.getpid(), signal.SIGTERM)
