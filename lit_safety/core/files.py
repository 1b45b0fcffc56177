"""Files and folders that exist whole or not at all, and have one writer at a time.

They are written under another name in the folder and renamed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import sys
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import BinaryIO

from filelock import lock_descriptor

from lit_safety.core.errors import UserError

_OWN_NAME = re.compile(r"\..+\.[0-9a-f]{8}\.partial")


#: The lock file: in a folder while a process writes it, and next to what is replaced whole.
LOCK = ".lock"
#: Error numbers of file systems without locks.
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF, errno.EINVAL}
#: Error numbers of a full disk, a quota and a limit on file sizes.
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
#: The locks that the running command holds, so that what it calls does not ask for them again.
_held: ContextVar[frozenset[str]] = ContextVar("held", default=frozenset())
#: Folders in which this process has removed what killed processes left.
_cleared: set[tuple[int, str]] = set()


class Lock:
    """A lock on a file, held by this process until `release`, or until it ends in whatever way.

    It is a lock of the operating system (`flock`), so a killed process leaves no lock behind.

    Args:
        path: the lock's file; made, and removed again by `release`.
        busy: the message if another process holds it.

    Raises:
        UserError: another process holds it, or the file cannot be made.
    """

    def __init__(self, path: Path, busy: str) -> None:
        self.path = path
        self._made = [folder for folder in path.parents if not folder.exists()]
        self.descriptor: int | None = None
        """The open file; a program that is started with it holds the lock too. None: released."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            while self.descriptor is None:
                self.descriptor = self._take(busy)
            _locks.add(self)
        except OSError as error:
            raise UserError(f"{path.parent}: cannot be written ({error.strerror or error})") from error

    def _take(self, busy: str) -> int | None:
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not lock_descriptor(descriptor, blocking=False):
                raise UserError(busy)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise
            print(
                f"note: {self.path.parent} lies on a file system without locks ({error.strerror}): another process "
                "could write there at the same time",
                file=sys.stderr,
            )
            return descriptor
        except UserError:
            os.close(descriptor)
            raise
        if _is_at(descriptor, self.path):
            return descriptor
        os.close(descriptor)  # its last holder has removed it in the meantime: take the new one
        return None

    def release(self) -> None:
        """Let others write; folders that were made for the lock alone are removed again."""
        descriptor, self.descriptor = self.descriptor, None
        if descriptor is None:
            return
        _remove(self.path)  # before others can take it: they compare their open file with the file at this path
        os.close(descriptor)
        for folder in self._made:
            try:
                folder.rmdir()
            except OSError:
                break

    def __del__(self) -> None:
        if getattr(self, "descriptor", None) is not None:
            self.release()


def _forget_locks() -> None:
    """In a forked process, such as a loader's worker: the locks belong to its parent, and end with the parent."""
    for lock in list(_locks):
        descriptor, lock.descriptor = lock.descriptor, None
        if descriptor is not None:
            os.close(descriptor)


#: Of this process.
_locks: weakref.WeakSet[Lock] = weakref.WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def lock_of(out: Path, replaced: bool = False) -> Path:
    """The path of an output's lock.

    Args:
        out: a folder, or a file where ``replaced``.
        replaced: it is replaced whole, so that its lock must lie outside of it.
    """
    return out.with_name(f".{out.name}{LOCK}") if replaced else out / LOCK


def take_lock(out: Path, replaced: bool = False) -> Lock | None:
    """The lock of an output; None: the running command holds it already.

    Raises:
        UserError: another process writes it.
    """
    path = lock_of(out, replaced)
    if os.path.realpath(path) in _held.get():
        return None
    return Lock(path, f"{out}: another process is writing there; wait for it, or give another path")


@contextlib.contextmanager
def one_writer(*outs: Path, replaced: bool = False) -> Iterator[None]:
    """Inside, no other process writes these outputs (see `take_lock`).

    Raises:
        UserError: one already does.
    """
    locks: list[Lock] = []
    before = _held.get()
    try:
        for out in outs:
            if (lock := take_lock(out, replaced)) is not None:
                locks.append(lock)
                _held.set(_held.get() | {os.path.realpath(lock.path)})
        yield
    finally:
        _held.set(before)
        for lock in reversed(locks):
            lock.release()


def partial_name(path: Path) -> Path:
    """Where `path` is written before it is whole, by one writer at a time; hidden, so no pattern of shards finds it."""
    return path.with_name(f".{path.name}.partial")


def _own_name(path: Path) -> Path:
    """As `partial_name`, of this writer alone."""
    return path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}.partial")


def clear_left_over(folder: Path) -> None:
    """Remove what killed processes left half written in `folder`. What a running process writes is locked and stays."""
    if (os.getpid(), str(folder)) in _cleared:
        return
    _cleared.add((os.getpid(), str(folder)))
    for name in os.listdir(folder):
        if _OWN_NAME.fullmatch(name):
            with contextlib.suppress(OSError):
                _clear(folder / name)


def _clear(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        if lock_descriptor(descriptor, blocking=False):
            _remove(path)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing. It gets the name `path` only when the block ends without an exception.

    Before that it has a name that only this writer uses. Of two writers, the file of the one that ends last stays.

    Raises:
        UserError: the folder cannot be written to, or the disk is full.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        clear_left_over(path.parent)
        temporary, file = _open_own(path)
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        if temporary is not None:
            _remove(temporary)
        if (reason := not_written(error)) is not None:
            raise UserError(f"{path}: cannot be written ({reason})") from error
        raise


def _open_own(path: Path) -> tuple[Path, BinaryIO]:
    while True:
        temporary = _own_name(path)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        _mark(descriptor)
        if _is_at(descriptor, temporary):
            return temporary, os.fdopen(descriptor, "wb")
        os.close(descriptor)  # another process removed it before it was locked, as if its writer had been killed


def _mark(descriptor: int) -> None:
    """Lock what is being written, for `clear_left_over`; without locks nothing is cleared."""
    with contextlib.suppress(OSError):
        lock_descriptor(descriptor, blocking=False)


def not_written(error: BaseException) -> str | None:
    """Why a file could not be written, if ``error`` says that, in any library's words; None: it says something else."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    text = " ".join(str(error).split())
    # Of safetensors, and of torch's writer, which says only that it failed.
    code = re.search(r"os error (\d+)|code: (\d+)", text) if type(error).__name__ == "SafetensorError" else None
    if code is not None:
        return os.strerror(int(code[1] or code[2]))
    if isinstance(error, RuntimeError) and ("PytorchStreamWriter" in text or "unexpected pos" in text):
        cause = error.__cause__ or error.__context__
        return not_written(cause) if isinstance(cause, OSError) else text
    return None


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # the error that led here is the one to report
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes) -> Path:
    """Write `data` to `path` whole or not at all."""
    with atomic_file(path) as file:
        file.write(data)
    return path


def append_line(path: Path, line: str) -> None:
    """Add a line to a journal. Its readers leave out a line that was cut short; the next one begins after it.

    Raises:
        UserError: the disk is full, or the file cannot be written to.
    """
    try:
        with open(path, "ab+") as file:
            cut = b""
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                cut = b"" if file.read(1) == b"\n" else b"\n"
            file.write(cut + f"{line}\n".encode())
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
    """Give a new folder to write into. It gets the name ``out`` only when the block ends without an exception.

    Raises:
        UserError: it cannot be written, the disk is full, or another process writes it.
    """
    out = out.with_name(out.resolve().name)
    old = out.with_name(f".{out.name}.old")
    with one_writer(out, replaced=True):
        partial, descriptor = None, -1
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            clear_left_over(out.parent)
            if old.exists() and not out.exists():  # a process was killed between its two renames
                old.rename(out)
            _remove(old)
            partial = _own_name(out)
            partial.mkdir()
            descriptor = os.open(partial, os.O_RDONLY)
            _mark(descriptor)
            yield partial
            if out.exists():
                out.rename(old)
            try:
                partial.rename(out)
            except OSError:
                if old.exists():
                    old.rename(out)
                raise
            _remove(old)
        except BaseException as error:
            if partial is not None:
                _remove(partial)
            if (reason := not_written(error)) is not None:
                raise UserError(f"{out}: cannot be written ({reason})") from error
            raise
        finally:
            if descriptor >= 0:
                os.close(descriptor)
