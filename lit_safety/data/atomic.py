"""Files and folders that are there whole or not at all: written under another name in the folder, renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from lit_safety.errors import UserError


def partial_name(path: Path) -> Path:
    """Where `path` is written before it is whole; hidden, so no pattern of shards finds it."""
    return path.with_name(f".{path.name}.partial")


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that takes the name `path` only when the block ends without an exception.

    Raises:
        UserError: the folder cannot be written to, or the disk is full.
    """
    temporary = partial_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        _remove(temporary)
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
    except BaseException:
        _remove(temporary)
        raise


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # the error that led here is the one to report
        path.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes) -> Path:
    """Write `data` to `path` whole or not at all."""
    with atomic_file(path) as file:
        file.write(data)
    return path


def append_line(path: Path, line: str) -> None:
    """Add a line to a journal, of which a reader takes the whole lines.

    Raises:
        UserError: the disk is full, or the file cannot be written to.
    """
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{line}\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """Give a new folder to write into; it takes the name ``out`` only when the block ends without an exception.

    Raises:
        UserError: it cannot be written.
    """
    partial, old = (out.with_name(f".{out.resolve().name}.{word}") for word in ("partial", "old"))
    try:
        for left_over in (partial, old):
            shutil.rmtree(left_over, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if out.exists():
            out.rename(old)
        try:
            partial.rename(out)
        except OSError:
            if old.exists():
                old.rename(out)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{out}: cannot be written ({error.strerror or error})") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
