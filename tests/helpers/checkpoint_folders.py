"""A checkpoint that is a folder, as FSDP2 writes it, without ranks."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.distributed import checkpoint


def save_folder(path: Path, number: int) -> Path:
    """A whole checkpoint whose one weight says ``number``."""
    path.mkdir()
    checkpoint.save({"state_dict": {"a": torch.full((1000,), float(number))}}, checkpoint_id=path, no_dist=True)
    torch.save({"epoch": 0, "number": number}, path / "meta.pt")
    return path


def number_of(path: Path) -> int:
    """What `save_folder` was given."""
    return int(torch.load(path / "meta.pt", weights_only=True)["number"])
