"""The folder of a run: a new folder for every run, the same one when a run is resumed.

runs/scdpo/2026-11-21_10-14-46/   config.yaml, checkpoints/, adapter/, events.out.tfevents...
runs/scdpo/latest                 -> the newest run
"""

from __future__ import annotations

import csv
import io
import os
import shutil
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from lit_safety.core.errors import UserError
from lit_safety.core.files import write_atomic
from lit_safety.core.processes import is_main_process

#: Set by rank 0's process for the processes that it launches, which have the same command line.
ENVIRONMENT = "LIT_SAFETY_RUN_FOLDER"
#: Beginnings of the names of files that every run writes before it starts.
BEFORE_TRAINING = ("config.yaml", "hparams.yaml", "events.out.tfevents", ".lock")
LAST_CHECKPOINT = Path("checkpoints") / "last.ckpt"


@dataclass
class RunOptions:
    """The place of the run's folder.

    Args:
        root: folder of all runs.
        name: the kind of run; null: the module's class name in lower case.
    """

    root: str = "runs"
    name: str | None = None


def new_folder(parent: Path) -> Path:
    """Make a folder named by the time. A second run in the same second gets a number after it.

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
    raise UserError(f"{parent} already holds 1000 runs that began in this second")


def last_checkpoint(parent: Path, to_train: bool = False) -> Path:
    """As `find_checkpoint`.

    Raises:
        UserError: there is no checkpoint, or no whole one.
    """
    found, damaged = _search(parent, to_train)
    if found is None and damaged:
        path, reason = damaged[0]
        raise UserError(
            f"`--ckpt_path last`: {path} cannot be used ({reason}), and {parent} does not hold a whole one; give a path"
        )
    if found is None:
        raise UserError(f"`--ckpt_path last`: {parent} does not hold a {LAST_CHECKPOINT}; train first, or give a path")
    return found


def find_checkpoint(parent: Path, to_train: bool = False) -> Path | None:
    """The newest whole checkpoint of the runs under ``parent``; None: there is none.

    Newer ones that are damaged are printed.

    Args:
        parent: the folder of the runs.
        to_train: one from which training can continue, not only weights.
    """
    return _search(parent, to_train)[0]


def _search(parent: Path, to_train: bool) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest whole checkpoint, and newer damaged ones with the reasons."""
    found = [path for run in parent.glob("*") if not run.is_symlink() for path in _checkpoints(run / LAST_CHECKPOINT)]
    damaged: list[tuple[Path, str]] = []
    chosen = None
    for path in sorted(found, key=lambda path: (_age(path), path.name == LAST_CHECKPOINT.name), reverse=True):
        reason = damage(path)
        if reason is None and path.name != LAST_CHECKPOINT.name and not path.is_dir() and not has_optimizer(path):
            continue  # only weights, saved so on purpose, such as the best ones
        if reason is None and to_train:
            reason = incomplete(path)
        if reason is None:
            chosen = path
            break
        damaged.append((path, reason))
    if damaged and is_main_process():
        instead = f"continuing from {chosen}" if chosen is not None else "there is no whole one"
        print(*(f"note: {path} cannot be used ({reason})" for path, reason in damaged), f"note: {instead}", sep="\n")
    return chosen, damaged


def _age(path: Path) -> float:
    """When it was written; for a dangling link, when the link was made."""
    return os.lstat(path).st_mtime if not os.path.exists(path) else path.stat().st_mtime


def _checkpoints(last: Path) -> list[Path]:
    """`last.ckpt` and the numbered ones next to it: `save_last` may be off, or a kill may have happened before it.

    A kill between the renames of a folder leaves the earlier one as `.last.ckpt.old`.
    """
    old = last.with_name(f".{last.name}.old")
    return [*last.parent.glob("[!.]*.ckpt"), *([old] if old.is_dir() else [])]


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, a file or a folder of a strategy; None: it is whole. No code in it is run."""
    from lit_safety.adapters.start_from import missing_parts, read_file

    if path.is_dir():
        return missing_parts(path)
    if not path.exists():
        return "is a dangling link"
    try:
        read_file(path)
    except UserError as error:
        return str(error).removeprefix(f"{path} ")
    # check every part's checksum: the directory at the end shows only that all parts exist
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as parts:
                broken = parts.testzip()
        except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
            return f"is not a readable checkpoint: {error}"
        if broken is not None:
            return f"is not a readable checkpoint: the checksum of {broken} is wrong"
    return None


def has_optimizer(path: Path) -> bool:
    """Whether a whole checkpoint file holds more than weights (`save_weights_only`), so that training can continue."""
    from lit_safety.adapters.start_from import read_file

    return "optimizer_states" in read_file(path)


#: What Lightning reads from a checkpoint when training continues.
_STATE = {
    "optimizer_states": list,
    "lr_schedulers": list,
    "loops": dict,
    "callbacks": dict,
    "global_step": int,
    "pytorch-lightning_version": str,
}


def incomplete(path: Path) -> str | None:
    """What a whole checkpoint file lacks, so that training cannot continue; None: nothing, or it is a folder."""
    from lit_safety.adapters.start_from import read_file

    if path.is_dir():
        return None
    found = read_file(path)
    if not found.get("optimizer_states"):
        return "holds only weights, and lacks the optimizer that training needs to continue"
    lost = [name for name, kind in _STATE.items() if not isinstance(found.get(name), kind)]
    if not lost and "fit_loop" not in found["loops"]:
        lost = ["loops"]
    return f"lacks {', '.join(lost)}, which training needs to continue" if lost else None


def point_latest(folder: Path) -> None:
    """Make `latest` next to ``folder`` a link to it, replacing an old link in one step."""
    link = folder.parent / "latest"
    temporary = folder.parent / f".latest-{os.getpid()}"
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(folder.name, target_is_directory=True)
        temporary.replace(link)
    except OSError as error:
        # Some file systems do not support links. The run does not need it.
        print(f"note: the link {link} -> {folder.name} could not be made ({error.strerror})")


def remove_if_untrained(folder: Path) -> None:
    """Remove the folder of a run that ended before it wrote results, and parents that are then empty."""
    results = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(BEFORE_TRAINING)]
    if results:
        return
    shutil.rmtree(folder, ignore_errors=True)
    for parent in (folder.parent, folder.parent.parent):
        try:
            parent.rmdir()
        except OSError:  # other runs are in it
            return


# A run's `config.yaml`: written when the run is accepted. Earlier ones are kept, and differences are printed.


#: Keys about where a run continues or writes, not about what it computes.
_PLACES = ("ckpt_path", "run.")
_SHOWN = 30


class KeepConfig(SaveConfigCallback):
    """Write the config when all checks of the run have passed. A resumed run's earlier one becomes `config-1.yaml`.

    A `fit` writes it before its first step, when checkpoint and data are read; the other commands at their start.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            self._write(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        if self.already_saved:
            return
        folder = Path(str(trainer.log_dir))  # read on every rank: rank 0's is sent to all
        self.already_saved = True
        if not trainer.is_global_zero:
            return
        path = folder / self.config_filename
        text = self.parser.dump(self.config, skip_none=False)
        new = yaml.safe_load(text)
        resumed = Path(str(trainer.ckpt_path)).parent.parent / path.name if trainer.ckpt_path is not None else path
        if (old := _read(resumed)) is not None:
            _tell(old, new, resumed)
        if path.is_file() and _read(path) != new:
            number = next(n for n in range(1, 1_000_000) if not path.with_name(f"{path.stem}-{n}.yaml").exists())
            write_atomic(path.with_name(f"{path.stem}-{number}.yaml"), path.read_bytes())
        write_atomic(path, text.encode())


def _read(path: Path) -> Any | None:
    """The content of a config; None: it is missing or cannot be read."""
    try:
        return yaml.safe_load(path.read_bytes())
    except (OSError, ValueError, yaml.YAMLError):
        return None


def _tell(old: Any, new: Any, path: Path) -> None:
    before, after = dict(_leaves(old)), dict(_leaves(new))
    changed = [key for key in {**before, **after} if before.get(key, _GONE) != after.get(key, _GONE)]
    changed = [key for key in changed if not key.startswith(_PLACES)]
    if changed:
        print(f"config  differs from {path} in")
    for key in changed[:_SHOWN]:
        print(f"        {key}: {_shown(before.get(key, _GONE))} -> {_shown(after.get(key, _GONE))}")
    if len(changed) > _SHOWN:
        print(f"        and {len(changed) - _SHOWN} more")


_GONE = object()


def _shown(value: Any) -> str:
    if value is _GONE:
        return "(not there)"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every plain value by its dotted key."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and value:
        for number, inner in enumerate(value):
            yield from _leaves(inner, f"{key}.{number}")
    else:
        yield key, value


# `metrics.csv` of a resumed run: Lightning's logger would delete its earlier rows.


def keep_rows(logger: Any) -> None:
    """Let a `CSVLogger` append to the existing file; other loggers are not changed. For rank 0."""
    if isinstance(logger, CSVLogger) and logger._experiment is None and "://" not in str(logger.log_dir):
        logger._experiment = _Appending(log_dir=logger.log_dir)


class _Appending(ExperimentWriter):
    """Lightning's writer, which starts with the columns of the existing rows."""

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        path = Path(self.metrics_file_path)
        if not path.is_file():
            return
        try:
            content = path.read_bytes().decode("utf-8")
            # A row that a kill cut short lacks its end, and its last number may lack digits.
            rows = list(csv.DictReader(io.StringIO(content[: content.rfind("\n") + 1])))
            columns = list(rows[0]) if rows else []
        except (UnicodeDecodeError, csv.Error):
            columns = []
        if not columns or any(name is None for name in columns):
            path.rename(_free(path))  # its rows cannot be continued, but they must not be deleted
            return
        self.metrics_keys = sorted(columns)
        self._write_all(rows)

    def _check_log_dir_exists(self) -> None:
        """Lightning deletes the existing file here."""

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        with open(self.metrics_file_path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        self.metrics_keys = fieldnames
        self._write_all(rows)

    def _write_all(self, rows: list[dict[str, Any]]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=self.metrics_keys, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(Path(self.metrics_file_path), text.getvalue().encode())


def _free(path: Path) -> Path:
    return next(one for n in range(1, 1_000_000) if not (one := path.with_name(f"{path.stem}-{n}.csv")).exists())
