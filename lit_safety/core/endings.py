"""How a command ends that cannot finish: signals, and errors of the machine, in one line each."""

from __future__ import annotations

import errno
import os
import signal
import sys
import sysconfig
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from lit_safety.core.errors import Terminated

STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)
"""Exit statuses of a command that Ctrl-C or SIGTERM ended."""

_WHY = {
    errno.ENOENT: "does not exist",
    errno.EACCES: "no permission; give another path, or the permission",
    errno.EPERM: "no permission; give another path, or the permission",
    errno.EROFS: "lies on a read-only file system; give another path",
    errno.EISDIR: "is a folder, but must be a file",
    errno.ENOTDIR: "must be a folder, but it or a folder above it is a file",
    errno.EEXIST: "already exists and is not a folder",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ELOOP: "is a link to itself",
    errno.ENOSPC: "no space is left on the disk; make room and run the same command again",
    errno.EDQUOT: "the disk quota is used up; make room and run the same command again",
    errno.EFBIG: "the file is larger than this shell allows (`ulimit -f`); raise the limit and run the command again",
    errno.EIO: "the disk cannot read or write it (input/output error)",
}


@contextmanager
def signals() -> Iterator[None]:
    """Within, the first SIGTERM raises `Terminated` in the main thread; a second one ends the process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Terminated

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)


def stopped_by(error: BaseException) -> signal.Signals | None:
    """The signal that caused an exception; None: another cause.

    Lightning turns an interrupt into a SystemExit, whose context is the interrupt.
    """
    if isinstance(error, SystemExit):
        error = error.__context__ or error
    if isinstance(error, Terminated):
        return signal.SIGTERM
    return signal.SIGINT if isinstance(error, KeyboardInterrupt) else None


def end_now(status: int) -> NoReturn:
    """End a stopped command and the processes that it started. It does not wait for threads that still work."""
    import multiprocessing

    for process in multiprocessing.active_children():
        process.terminate()
    others = [one for one in threading.enumerate() if one is not threading.main_thread() and not one.daemon]
    for one in others:
        one.join(1.0)  # a process that cleans up needs less time than this
    if not any(one.is_alive() for one in others):
        sys.exit(status)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # the stream is closed, or None
            stream.flush()
    os._exit(status)


def explain(error: BaseException) -> str | None:
    """One line for an error of the machine; None: a defect of our code or of the user's own class.

    A file error that passes through the user's own code keeps its traceback, because the user needs it.
    """
    chain = list(_chain(error))
    if any(_few_handles(one) for one in chain):
        return (
            f"too many open files: this shell allows {_handles()} (`ulimit -n`); raise the limit, such as `ulimit -n "
            "4096`, or use fewer worker processes"
        )
    if (lost := next((text for one in chain if (text := _lost_process(one)) is not None), None)) is not None:
        return lost
    if any(isinstance(one, RecursionError) and "JSON" in str(one) for one in chain):
        return "a JSON file of a model is nested too deeply; copy the model's folder again"
    if any(_no_checkpoint(one) for one in chain):
        return (
            "the checkpoint (`--ckpt_path`) is not a checkpoint, or is cut short or damaged: give another one; `last` "
            "finds the newest one of the run"
        )
    if of_own_class(error):
        return None
    if isinstance(error, OSError) and error.errno in _WHY and error.filename is not None:
        return f"{_name(error.filename)}: {_WHY[error.errno]}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS):
        return f"{os.strerror(error.errno)}: {_WHY[error.errno]}"
    return None


def of_own_class(error: BaseException) -> bool:
    """Whether a frame of the error's traceback is neither ours, nor a library's, nor Python's own."""
    paths = sysconfig.get_paths()
    ours = Path(__file__).parents[1]  # the package
    known = [str(ours), *(paths[key] for key in ("stdlib", "platstdlib", "purelib", "platlib"))]
    known += [str(Path(place).resolve()) for place in known]
    for file in _files(error):
        if not file.startswith("<") and not any(file.startswith(place + os.sep) for place in known):
            return True
    return False


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _few_handles(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return True
    # libraries in C and Rust, and torch's sharing of memory between processes, give no error number, only words
    return "Too many open files" in str(error) or "0 items of ancdata" in str(error)


def _no_checkpoint(error: BaseException) -> bool:
    """Whether the error is that torch.load cannot read a file: torch did not write it, or not to its end.

    For such a file it raises many kinds: EOFError, IndexError, KeyError, UnpicklingError, RuntimeError.
    """
    if isinstance(error, OSError | MemoryError) or not isinstance(error, Exception):
        return False
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        file = code.co_filename.replace(os.sep, "/")
        if file.endswith("torch/serialization.py") and code.co_name in ("load", "_load", "_legacy_load"):
            return True
        trace = trace.tb_next
    return False


def _files(error: BaseException) -> Iterator[str]:
    """The source files that an error passed through."""
    trace = error.__traceback__
    while trace is not None:
        yield trace.tb_frame.f_code.co_filename
        trace = trace.tb_next


def _handles() -> str:
    try:
        import resource
    except ImportError:  # Windows
        return "few"
    return str(resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def _lost_process(error: BaseException) -> str | None:
    text = " ".join(str(error).split())
    told = isinstance(error, RuntimeError) and "DataLoader worker" in text and ("killed" in text or "exited" in text)
    # Killed while it hands over a batch: its connection breaks before torch checks whether it still runs.
    broken = isinstance(error, ConnectionError | EOFError) and any(
        file.replace(os.sep, "/").endswith("torch/utils/data/dataloader.py") for file in _files(error)
    )
    if told or broken:
        return (
            f"a process that reads the data has ended ({text[:200]}): it was killed, most often because the memory is "
            "used up; use a smaller `data.init_args.num_workers` or batch, and continue with `--ckpt_path last`"
        )
    if type(error).__name__ in ("ProcessExitedException", "BrokenProcessPool"):
        return (
            f"a process of this command has ended ({text[:200]}): it was killed, most often because the memory is used "
            "up; run the same command again with fewer --processes"
        )
    return None


def _name(filename: str | bytes | int) -> str:
    return os.fsdecode(filename) if isinstance(filename, bytes) else str(filename)
