"""Checkpoints that an interrupted run leaves whole: Lightning's `ModelCheckpoint`, written atomically."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any
from weakref import proxy

from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy

from lit_safety.callbacks.checkpoint_io import AtomicCheckpointIO, NotWritten
from lit_safety.data.atomic import partial_name, sync_folder
from lit_safety.errors import UserError


class AtomicModelCheckpoint(ModelCheckpoint):
    """`ModelCheckpoint` whose checkpoints, files or folders, take their name only when they are whole.

    At every moment `last.ckpt`, a numbered checkpoint beside it or `.last.ckpt.old` is whole, so that
    `--ckpt_path last` finds one after a kill at any point. Its options are Lightning's.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()

    def save_now(self, trainer: Trainer) -> str:
        """Write `last.ckpt` as things stand, whatever `save_last` says; returns where the state of now lies."""
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
        UserError: it cannot be written, on all ranks where one writes for all; what was there stays.
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
            kept = f"{before} is whole" if before else "there is none from before"
            raise UserError(f"{failed}; {kept}: make room, then go on with `--ckpt_path last`")
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(proxy(self))

    def _save_folder(self, trainer: Trainer, path: Path) -> None:
        partial = partial_name(path)
        if trainer.is_global_zero:
            shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        trainer.strategy.barrier()
        try:
            trainer.save_checkpoint(partial, self.save_weights_only)
        except (OSError, RuntimeError) as error:
            # Every rank writes a part, and the others cannot be told: they end when this one is gone.
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
    """Give the folder ``partial`` the name ``path``, whatever has it; two renames, nothing is written."""
    old = path.with_name(f".{path.name}.old")
    for file in (file for file in partial.rglob("*") if file.is_file()):
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
    if path.exists():  # else `old` is all that a kill has left, and stays until the new one has its name
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
