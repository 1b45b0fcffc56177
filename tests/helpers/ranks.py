"""The real command line on several ranks over gloo, without paying for Python's imports at every start.

Ranks are forked from a server that has imported everything (`warm_ranks`), and find in their environment what torchrun
puts there. `main` is the function behind `python -m lit_safety`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import random
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.helpers.warm_ranks"])


def _rank(arguments: list[str], environment: dict[str, str], log: str) -> None:
    os.environ.update(environment)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    faulthandler.enable()  # who is killed by a signal says where it was
    from lit_safety.__main__ import main

    sys.argv = ["lit_safety", *arguments]
    sys.exit(main(arguments))


@dataclass
class Ranks:
    """Processes of one command line."""

    processes: list[BaseProcess]
    logs: list[Path]

    def wait(self, timeout: float = 480.0) -> list[int | None]:
        """Exit codes; who is still running when the time is up is killed, and has None."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        return codes

    def said(self, rank: int = 0) -> str:
        return self.logs[rank].read_text(errors="replace")


def start(arguments: Sequence[str], logs: Path, ranks: int = 2) -> Ranks:
    """Begin ``arguments`` on so many ranks, with their outputs in ``logs``; one rank is a plain single process."""
    logs.mkdir(parents=True, exist_ok=True)
    files = [logs / f"rank{rank}.txt" for rank in range(ranks)]
    # One rank alone asks for a port too, where its strategy makes a process group.
    shared = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    if ranks > 1:
        shared |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "NODE_RANK": "0", "GROUP_RANK": "0"}
        shared["TORCHELASTIC_RUN_ID"] = "tests"
    processes: list[BaseProcess] = []
    for rank, file in enumerate(files):
        own = {"LOCAL_RANK": str(rank), "RANK": str(rank)} if ranks > 1 else {}
        process = _FORKS.Process(target=_rank, args=(list(arguments), shared | own, str(file)))
        process.start()
        processes.append(process)
    return Ranks(processes, files)


def run(arguments: Sequence[str], logs: Path, ranks: int = 2, timeout: float = 480.0) -> Ranks:
    """Run ``arguments`` to their end, which must be a good one."""
    started = start(arguments, logs, ranks)
    codes = started.wait(timeout)
    assert codes == [0] * ranks, "\n".join(f"rank {i}: {code}\n{started.said(i)}" for i, code in enumerate(codes))
    return started


def _free_port() -> int:
    """Below the range from which outgoing connections get theirs: one of those may take a port before rank 0 does."""
    while True:
        port = random.SystemRandom().randrange(20_000, 30_000)
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("", port))
            return port
