"""Where a run writes: a new folder for every run, the same one when a run is resumed.

runs/scdpo/2026-11-21_10-14-46/   config.yaml, checkpoints/, adapter/, events.out.tfevents...
runs/scdpo/latest                 -> the run that began last
"""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from lit_safety.errors import UserError

#: Written by rank 0's process for the processes it launches (they are copies of the same command line).
ENVIRONMENT = "LIT_SAFETY_RUN_FOLDER"
#: How the names of files begin that every run writes before it has done anything.
BARREN = ("config.yaml", "hparams.yaml", "events.out.tfevents")
LAST_CHECKPOINT = Path("checkpoints") / "last.ckpt"


@dataclass
class RunOptions:
    """Where the run's folder is made.

    Args:
        root: folder of all runs.
        name: what kind of run this is; null: the module's class name in lower case.
    """

    root: str = "runs"
    name: str | None = None


def is_main_process() -> bool:
    """Whether this process is rank 0, by the variables that launchers set before torch.distributed is up."""
    names = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
    return all(os.environ.get(name, "0") == "0" for name in names)


def is_launched() -> bool:
    """Whether another process of this command line, rank 0's, started this one and waits for it."""
    return os.environ.get("LOCAL_RANK", "0") != "0"


def new_folder(parent: Path) -> Path:
    """Make a folder named by the time; a run that starts in the same second gets a number behind it.

    Raises:
        UserError: if ``parent`` cannot be written.
    """
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(1, 1000):
            folder = parent / (stamp if attempt == 1 else f"{stamp}-{attempt}")
            try:
                folder.mkdir()
            except FileExistsError:
                continue
            return folder
    except OSError as error:
        raise UserError(f"cannot write to {parent} ({error.strerror}): set `run.root` to a folder you own") from error
    raise UserError(f"{parent} already holds 1000 runs of this second")


def last_checkpoint(parent: Path) -> Path:
    """As `find_checkpoint`.

    Raises:
        UserError: if no run has one.
    """
    if (found := find_checkpoint(parent)) is None:
        raise UserError(f"`--ckpt_path last`: no run under {parent} has {LAST_CHECKPOINT}; train first, or give a path")
    return found


def find_checkpoint(parent: Path) -> Path | None:
    """The newest checkpoint to go on from of the newest run under ``parent`` that has one; None: no run has."""
    runs = [run for run in parent.glob("*") if (run / LAST_CHECKPOINT.parent).is_dir() and not run.is_symlink()]
    found = [path for run in runs for path in [_newest(run / LAST_CHECKPOINT)] if path is not None]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _newest(last: Path) -> Path | None:
    """`last.ckpt`, or a numbered checkpoint beside it where that is newer: `save_last` was off, or a kill came between.

    A kill between the renames of a folder leaves the one before as `.last.ckpt.old`.
    """
    found = sorted(last.parent.glob("[!.]*.ckpt"), key=lambda path: (path.stat().st_mtime, path == last), reverse=True)
    for path in found:
        if path == last or path.is_dir() or _has_optimizer(path):
            return path
    old = last.with_name(f".{last.name}.old")
    return old if old.is_dir() else None


def _has_optimizer(path: Path) -> bool:
    """Whether a checkpoint file is more than weights (`save_weights_only`), so that a run can go on from it."""
    from lit_safety.adapters.start_from import read_file

    try:
        return "optimizer_states" in read_file(path)
    except UserError:
        return False


def point_latest(folder: Path) -> None:
    """Make `latest` beside ``folder`` point to it, replacing the link in one step."""
    link = folder.parent / "latest"
    temporary = folder.parent / f".latest-{os.getpid()}"
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(folder.name, target_is_directory=True)
        temporary.replace(link)
    except OSError as error:
        # Some file systems know no links; the run itself is not harmed.
        print(f"note: no link {link} -> {folder.name} ({error.strerror})")


def remove_if_barren(folder: Path) -> None:
    """Remove the folder of a run that ended before it had anything to keep, and parents that it leaves empty."""
    results = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(BARREN)]
    if results:
        return
    shutil.rmtree(folder, ignore_errors=True)
    for parent in (folder.parent, folder.parent.parent):
        try:
            parent.rmdir()
        except OSError:  # other runs are in it
            return
