"""Putting finished folders in place."""

import shutil
from pathlib import Path


def swap_in(made: Path, target: Path) -> None:
    """Puts the finished folder in the place of the old one: two renames, so a reader never sees half a folder."""
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    made.rename(target)
    shutil.rmtree(old, ignore_errors=True)
