"""A checkpoint file that exists whole or not at all, written next to its place and not in the system's /tmp."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any
from weakref import proxy

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_safety.core.errors import UserError
from lit_safety.core.files import atomic_file, partial_name, sync_folder


class NotWritten(UserError):
    """A checkpoint could not be written (disk full, no permission). Earlier checkpoints are not changed."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """As Lightning's for local files, but synced to the disk and renamed within its folder.

    Lightning's writes to the system's temporary folder and then moves the file. That is often another disk: the move is
    then a copy that a kill can cut short, and it fills a small /tmp. It also holds the whole file in memory first.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Raises:
        NotWritten: the disk is full, or the folder cannot be written to.
        """
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            with atomic_file(Path(path)) as file:
                _save(checkpoint, file)
        except UserError as error:
            raise NotWritten(str(error)) from error


def _save(checkpoint: dict[str, Any], file: Any) -> None:
    try:
        torch.save(checkpoint, file)
    except RuntimeError as error:  # if the disk is full, torch's writer says only that it failed
        cause = error.__cause__ or error.__context__
        raise cause if isinstance(cause, OSError) else OSError(str(error).splitlines()[0]) from error


# Checkpoints that stay whole if a run is interrupted: Lightning's `ModelCheckpoint`, written atomically.


class AtomicModelCheckpoint(ModelCheckpoint):
    """`ModelCheckpoint` whose checkpoints, files or folders, get their name only when they are whole.

    At every moment `last.ckpt`, a numbered checkpoint next to it or `.last.ckpt.old` is whole, so that
    `--ckpt_path last` finds one after a kill at any point. Its options are Lightning's.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()

    def save_now(self, trainer: Trainer) -> str:
        """Write `last.ckpt` now, for any value of `save_last`; returns the path of the current state's checkpoint."""
        if self._last_global_step_saved == trainer.global_step:
            return self._last_checkpoint_saved
        kept, self.save_last = self.save_last, True
        try:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        finally:
            self.save_last = kept
        return self.last_model_path

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Raises:
        UserError: it cannot be written; raised on all ranks if one writes for all. Earlier checkpoints stay.
        """
        failed = None
        try:
            if in_folders(trainer) and "://" not in filepath:
                self._save_folder(trainer, Path(filepath))
            else:
                trainer.save_checkpoint(filepath, self.save_weights_only)
        except NotWritten as error:  # on rank 0, while the others wait for it
            failed = str(error)
            trainer.strategy.barrier("Trainer.save_checkpoint")
        if failed := trainer.strategy.broadcast(failed):
            before = self._last_checkpoint_saved
            kept = f"{before} is whole" if before else "there is no earlier checkpoint"
            raise UserError(f"{failed}; {kept}: make room, then continue with `--ckpt_path last`")
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(proxy(self))

    def _save_folder(self, trainer: Trainer, path: Path) -> None:
        partial = partial_name(path)
        if trainer.is_global_zero:
            shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
        trainer.strategy.barrier()
        try:
            trainer.save_checkpoint(partial, self.save_weights_only)
        except (OSError, RuntimeError) as error:
            # Every rank writes a part, and this rank cannot inform the others: they end when it has ended.
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            before = self._last_checkpoint_saved or "none from before"
            raise UserError(f"{path}: cannot be written ({reason}); the last whole checkpoint: {before}") from error
        if trainer.is_global_zero:
            swap(partial, path)
        trainer.strategy.barrier()


def in_folders(trainer: Trainer) -> bool:
    """Whether a checkpoint is a folder that all ranks write into."""
    strategy: Any = trainer.strategy
    if isinstance(strategy, ModelParallelStrategy):
        return bool(strategy._save_distributed_checkpoint)
    return isinstance(strategy, DeepSpeedStrategy)


def swap(partial: Path, path: Path) -> None:
    """Give the folder ``partial`` the name ``path`` and replace what has that name, by two renames."""
    old = path.with_name(f".{path.name}.old")
    for file in (file for file in partial.rglob("*") if file.is_file()):
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
    if path.exists():  # else a kill has left only `old`, which stays until the new one has its name
        _remove(old)
        path.rename(old)
    partial.rename(path)
    sync_folder(path.parent)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


# SIGTERM, which schedulers and containers send: finish the step, save, end.


class StopOnSignal(Callback):
    """Saves `last.ckpt` at the next whole step after a SIGTERM on any rank, and ends the run on all of them.

    Lightning's own handler communicates with the other ranks at once, at any point of their work. Here the ranks agree
    after a step. A second SIGTERM ends the process at once. The command line adds this callback to every `fit`, as the
    last one.
    """

    def __init__(self) -> None:
        self.saved: str | None = None
        """The path of the checkpoint, after it has saved one."""
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
        # In the middle of an accumulated batch the state is not complete.
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
        # With several ranks Lightning waits for the device in every step anyway, so this costs only one message.
        asked = torch.tensor(int(self._asked), device=trainer.strategy.root_device)
        return bool(trainer.strategy.reduce(asked, reduce_op="sum"))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._before)
            self._before = None
