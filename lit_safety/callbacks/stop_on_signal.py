"""SIGTERM, as schedulers and containers send it: finish the step, save, end."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_safety.callbacks.checkpoint import AtomicModelCheckpoint


class StopOnSignal(Callback):
    """Saves `last.ckpt` at the next whole step after a SIGTERM on any rank, and ends the run on all of them.

    Lightning's own handler sends a message to the other ranks from within the handler, wherever each of them is; here
    the ranks agree after a step. A second SIGTERM ends the process at once. The command line adds it to every `fit`, as
    the last callback.
    """

    def __init__(self) -> None:
        self.saved: str | None = None
        """Where to, once it has."""
        self._asked = False
        self._before: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        self._asked = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Within an accumulated batch there is nothing to go on from.
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch:
            self._stop_if_asked(trainer)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.fit_loop.epoch_loop.global_step and not trainer.sanity_checking:
            self._stop_if_asked(trainer)

    def _stop_if_asked(self, trainer: Trainer) -> None:
        if not self._anywhere(trainer):
            return
        keepers = [one for one in trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint)]
        for keeper in keepers[:1]:
            if isinstance(keeper, AtomicModelCheckpoint):
                self.saved = keeper.save_now(trainer)
            else:
                self.saved = str(Path(keeper.dirpath or trainer.default_root_dir) / "last.ckpt")
                trainer.save_checkpoint(self.saved)
        raise SIGTERMException

    def _anywhere(self, trainer: Trainer) -> bool:
        if trainer.world_size == 1:
            return self._asked
        # Lightning itself waits for the device in every step of several ranks, so this costs a message and no more.
        asked = torch.tensor(int(self._asked), device=trainer.strategy.root_device)
        return bool(trainer.strategy.reduce(asked, reduce_op="sum"))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._before)
            self._before = None
