"""Where a run writes: a new folder for every run, the same one when a run is resumed.

runs/scdpo/2026-11-21_10-14-46/   config.yaml, checkpoints/, adapter/, events.out.tfevents...
runs/scdpo/latest                 -> the run that began last
"""

from __future__ import annotations

import os
import shutil
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from lit_safety.errors import UserError

#: Written by rank 0's process for the processes it launches (they are copies of the same command line).
ENVIRONMENT = "LIT_SAFETY_RUN_FOLDER"
#: How the names of files begin that every run writes before it has done anything.
BARREN = ("config.yaml", "hparams.yaml", "events.out.tfevents", ".lock")
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
        UserError: if no run has one, or none is whole.
    """
    found, damaged = _search(parent)
    if found is None and damaged:
        path, reason = damaged[0]
        raise UserError(
            f"`--ckpt_path last`: {path} is damaged ({reason}), and no run under {parent} has a whole one; give a path"
        )
    if found is None:
        raise UserError(f"`--ckpt_path last`: no run under {parent} has {LAST_CHECKPOINT}; train first, or give a path")
    return found


def find_checkpoint(parent: Path) -> Path | None:
    """The newest whole checkpoint to go on from of the runs under ``parent``; None: no run has one.

    What is newer and damaged is named on the way.
    """
    return _search(parent)[0]


def _search(parent: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest whole checkpoint, and what is newer and damaged, with the reasons."""
    found = [path for run in parent.glob("*") if not run.is_symlink() for path in _checkpoints(run / LAST_CHECKPOINT)]
    damaged: list[tuple[Path, str]] = []
    chosen = None
    for path in sorted(found, key=lambda path: (path.stat().st_mtime, path.name == LAST_CHECKPOINT.name), reverse=True):
        if (reason := damage(path)) is not None:
            damaged.append((path, reason))
        elif path.is_dir() or path.name == LAST_CHECKPOINT.name or has_optimizer(path):
            chosen = path
            break
    if damaged and is_main_process():
        instead = f"going on from {chosen}" if chosen is not None else "there is no whole one"
        print(*(f"note: {path} is damaged ({reason})" for path, reason in damaged), f"note: {instead}", sep="\n")
    return chosen, damaged


def _checkpoints(last: Path) -> list[Path]:
    """`last.ckpt` and the numbered ones beside it: `save_last` may be off, or a kill may have come between.

    A kill between the renames of a folder leaves the one before as `.last.ckpt.old`.
    """
    old = last.with_name(f".{last.name}.old")
    return [*last.parent.glob("[!.]*.ckpt"), *([old] if old.is_dir() else [])]


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, a file or a folder of a strategy; None: it is whole. Nothing of it is run."""
    from lit_safety.adapters.checkpoint_folder import missing_parts
    from lit_safety.adapters.start_from import read_file

    if path.is_dir():
        return missing_parts(path)
    try:
        read_file(path)
    except UserError as error:
        return str(error).removeprefix(f"{path} ")
    if zipfile.is_zipfile(path):  # every part's checksum; the directory at the file's end says only that all are there
        try:
            with zipfile.ZipFile(path) as parts:
                broken = parts.testzip()
        except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
            return f"is no readable checkpoint: {error}"
        if broken is not None:
            return f"is no readable checkpoint: the checksum of {broken} is wrong"
    return None


def has_optimizer(path: Path) -> bool:
    """Whether a whole checkpoint file is more than weights (`save_weights_only`), so that a run can go on from it."""
    from lit_safety.adapters.start_from import read_file

    return "optimizer_states" in read_file(path)


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
