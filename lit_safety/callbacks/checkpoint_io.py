"""A checkpoint file that is there whole or not at all, written beside its place and not in the system's /tmp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from lit_safety.data.atomic import atomic_file
from lit_safety.errors import UserError


class NotWritten(UserError):
    """A checkpoint could not be written: no space, no permission. What was there before is untouched."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """As Lightning's for local files, but synced to the disk and renamed within its folder.

    Lightning's writes to the system's temporary folder and moves: often another disk, so that the move is a copy that a
    kill can cut short, and that fills a small /tmp. It also holds the whole file in memory first.
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
    except RuntimeError as error:  # torch's writer says of a full disk only that it failed
        cause = error.__cause__ or error.__context__
        raise cause if isinstance(cause, OSError) else OSError(str(error).splitlines()[0]) from error
