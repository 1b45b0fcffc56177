"""Several processes run attacks: each takes the next free one and stores its result under done/.

The result of an attack on an arm does not depend on the process, so the report is the same.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection
from typing import Any, Protocol

from lit_safety.core.endings import signals
from lit_safety.core.errors import UserError
from lit_safety.core.processes import deaf_to_ctrl_c, end_all, end_with_parent
from lit_safety.core.progress import Shown, shown

Unit = tuple[str, list[str]]
"""An attack, and the arms on which one process runs it."""


class Run(Protocol):
    """What is needed from the run, which is sent to every process."""

    drawing: Any
    """How images are drawn, including the device."""
    attacks: dict[str, Any]

    def cell(self, name: str, attack: Any, arm: str, scheduler: str) -> Any:
        """Run an attack on an arm and store the result."""

    def place_judges(self) -> None:
        """Move the judges to this process's device."""

    def images_of(self, unit: Unit) -> int:
        """The largest number of images that an attack on some arms draws."""


def do_in_processes(run: Run, units: Sequence[Unit], schedulers: dict[str, str], processes: int) -> None:
    """Run all units; their results are then stored under done/.

    Args:
        run: the run, which is sent to every process.
        units: the units, in the order in which they are started.
        schedulers: the scheduler of each arm.
        processes: number of processes.

    Raises:
        UserError: an attack raised it, or a process was killed; finished results are kept.
    """
    import torch

    count = min(processes, len(units))
    context = multiprocessing.get_context("spawn")  # a fork of a process with torch's threads may hang
    threads = max(1, torch.get_num_threads() // max(1, count))
    waiting = list(units)
    pipes: dict[Any, Any] = {}
    with shown(f"attacks in {count} processes", sum(map(run.images_of, units))) as bar:
        try:
            for rank in range(count):
                ours, theirs = context.Pipe()
                work = (run, schedulers, rank, threads, theirs)
                process = context.Process(target=_work, args=work, daemon=True, name=f"attack {rank}")
                with deaf_to_ctrl_c():
                    process.start()
                theirs.close()  # so that the pipe ends when the process ends
                pipes[ours] = process
                ours.send(waiting.pop(0))
            _listen(dict(pipes), waiting, bar)
        finally:
            end_all(pipes.values())


def _listen(left: dict[Any, Any], waiting: list[Unit], bar: Shown) -> None:
    while left:
        ready: list[Any] = connection.wait(list(left))
        for pipe in ready:
            try:
                what, value = pipe.recv()
            except (EOFError, OSError):
                process = left.pop(pipe)
                process.join()
                if process.exitcode:
                    raise UserError(
                        f"the attacking process {process.name.split()[-1]} ended with status {process.exitcode} "
                        "(killed, or out of memory?); finished results are kept, run the same command again to "
                        "continue"
                    ) from None
                continue
            if what == "error":
                raise UserError(value)
            if what == "advance":
                bar.advance(value)
            elif what == "tell":
                bar.tell(value)
            else:  # it is idle
                with suppress(BrokenPipeError):  # its end is noticed next
                    pipe.send(waiting.pop(0) if waiting else None)


def _work(run: Run, schedulers: dict[str, str], rank: int, threads: int, pipe: Any) -> None:
    """The work of one process. It ends when its parent process ends, even if that one is killed."""
    import torch

    end_with_parent()
    torch.set_num_threads(threads)
    if str(run.drawing.device) == "cuda" and torch.cuda.device_count() > 1:
        torch.cuda.set_device(rank % torch.cuda.device_count())  # so that `cuda` means this device here
    told = _Told(pipe)
    vars(run)["show"] = told.shown
    with suppress(KeyboardInterrupt, BrokenPipeError, EOFError), signals():
        try:
            run.place_judges()
            while (unit := pipe.recv()) is not None:
                name, arms = unit
                for arm in arms:
                    told.done = 0
                    run.cell(name, run.attacks[name], arm, schedulers[arm])
                    told.advance(run.images_of((name, [arm])) - told.done)
                pipe.send(("idle", None))
        except UserError as error:
            pipe.send(("error", str(error)))


class _Told:
    """Sends progress to the process that shows it."""

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.done, self.what = pipe, 0, ""

    @contextmanager
    def shown(self, what: str, total: int | None) -> Iterator[_Told]:
        self.what = what
        yield self

    def advance(self, count: int) -> None:
        self.done += count
        if count:
            self.pipe.send(("advance", count))

    def tell(self, text: str) -> None:
        self.pipe.send(("tell", f"{self.what}: {text}"))
