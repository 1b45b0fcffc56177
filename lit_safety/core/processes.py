"""Which process this is, and which process started it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import connection, resource_tracker
from typing import Any, TypeVar

from lit_safety.core.errors import UserError


def is_main_process() -> bool:
    """Whether this process is rank 0, by the variables that launchers set before torch.distributed is up."""
    names = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
    return all(os.environ.get(name, "0") == "0" for name in names)


def is_launched() -> bool:
    """Whether another process of this command line, rank 0's, started this one and waits for it."""
    return os.environ.get("LOCAL_RANK", "0") != "0"


# A process that ends together with the process that started it, even if that one is killed.


#: Holds the id of the process that started this one and with which this one must end.
VARIABLE = "LIT_SAFETY_ENDS_WITH"
#: Seconds between two checks.
POLL = 0.5
#: Seconds that the process has to end by itself, such as to write a checkpoint, before it is killed.
GRACE = 120.0


def watch_parent() -> None:
    """Start to watch the process that `VARIABLE` names, if it is set."""
    parent = os.environ.pop(VARIABLE, "")
    if parent.isdigit():
        end_with(int(parent))


def end_with(parent: int) -> None:
    """From now on, send this process a SIGTERM when ``parent`` has ended."""
    threading.Thread(target=_watch, args=(parent,), daemon=True, name="watch parent").start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(128 + signal.SIGTERM)


# Processes that a command starts and that must end with it, however it ends.


Work = TypeVar("Work")
Done = TypeVar("Done")


def check_count(count: int, option: str) -> None:
    """Refuse a number of processes or threads that is too large for this machine's cores.

    Raises:
        UserError: names the option and the limit.
    """
    most = max(64, 4 * (os.cpu_count() or 1))
    if not 1 <= count <= most:
        raise UserError(f"{option} {count}: must be at least 1, and at most {most} on this machine")


@contextmanager
def deaf_to_ctrl_c() -> Iterator[None]:
    """Processes that are started inside do not receive Ctrl-C, which a terminal sends to all of them.

    Their parent ends them, so that only one process prints a line. A Ctrl-C during this block arrives after it.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # multiprocessing's own process: starting it later would unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_all(processes: Iterable[Any], patience: float = 5.0) -> None:
    """End processes by SIGTERM, and by SIGKILL those that are still there after `patience` seconds."""
    processes = list(processes)
    for process in processes:
        if process.is_alive():
            process.terminate()
    for process in processes:
        process.join(patience)
        if process.is_alive():
            process.kill()
        process.join()


def end_with_parent() -> None:
    """In a process of multiprocessing: end as soon as the process that started it has ended, even if it was killed.

    SIGTERM ends it at once. Ctrl-C does not, because its parent receives it too.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if (parent := multiprocessing.parent_process()) is not None:
        threading.Thread(target=_wait, args=(parent.sentinel,), daemon=True).start()


def _wait(sentinel: Any) -> None:
    connection.wait([sentinel])
    os._exit(1)


def each(work: Callable[[Work], Done], parts: Sequence[Work], processes: int) -> Iterator[Done]:
    """`work(part)` for every part, in their order, in `processes` processes. `work`: of a module.

    If a process is killed, the work ends with BrokenProcessPool. If this command ends, its processes end too.
    """
    # Not a fork: the fork of a process that runs threads may hang.
    count = max(1, min(processes, len(parts)))
    pool = ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"), initializer=end_with_parent)
    before, started = multiprocessing.active_children(), []
    try:
        with deaf_to_ctrl_c():
            done = pool.map(work, parts)
            started = [one for one in multiprocessing.active_children() if one not in before]
        yield from done
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        end_all(started)
        raise
    pool.shutdown()


#: What launchers count processes by.
_COUNTS = (
    *("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT"),
    *("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"),
)


def check_launcher() -> None:
    """Refuse a launcher's variables that are not whole numbers. An empty variable counts as not set.

    Raises:
        UserError: names the variable.
    """
    for name in _COUNTS:
        value = os.environ.get(name)
        if value is not None and not value.strip():
            del os.environ[name]
        elif value is not None and not (value.strip().isascii() and value.strip().isdigit()):
            raise UserError(f"the environment variable {name} is {value[:40]!r}, not a whole number: `unset {name}`, "
                            "or let the launcher set it")  # fmt: skip
