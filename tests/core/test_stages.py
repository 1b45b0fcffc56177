"""Work in stages, here and in several processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable

import pytest
import torch

from lit_safety.core.errors import UserError
from lit_safety.core.stages import AHEAD, in_stages, on_the_way, staged


class Noted:
    """Doubles numbers, and notes what is done when."""

    def __init__(self) -> None:
        self.notes: list[tuple[str, int]] = []

    def start(self, task: int) -> int:
        self.notes.append(("start", task))
        return task

    def run(self, started: int) -> Callable[[], int]:
        self.notes.append(("run", started))

        def finish() -> int:
            self.notes.append(("finish", started))
            return 2 * started

        return finish

    def close(self) -> None:
        self.notes.append(("close", 0))


class Doubles:
    """The same in another process; some tasks go wrong."""

    def __init__(self, rank: int, processes: int) -> None:
        self.rank = rank

    def start(self, task: int) -> int:
        return task

    def run(self, started: int) -> Callable[[], tuple[int, int]]:
        if started == 1000:
            raise UserError("task 1000 is wrong")
        if started == 2000:
            os.kill(os.getpid(), signal.SIGKILL)
        if started == 3000:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return lambda: (2 * started, self.rank)

    def close(self) -> None:
        pass


def test_while_a_result_is_taken_the_next_task_runs_and_one_more_is_started() -> None:
    work = Noted()
    results = in_stages(work, range(4))
    assert next(results) == 0
    assert work.notes == [
        ("start", 0), ("start", 1), ("run", 0), ("start", 2), ("run", 1), ("finish", 0),
    ]  # fmt: skip
    assert list(results) == [2, 4, 6]
    for count in (0, 1, 2, 3):
        assert list(in_stages(Noted(), range(count))) == [2 * n for n in range(count)]


def test_one_process_works_here_and_closes_what_it_made() -> None:
    work = Noted()
    with staged(lambda rank, processes: work, 1, "double") as results:
        assert list(results(range(3))) == [0, 2, 4]
    assert work.notes[-1] == ("close", 0)


@pytest.mark.slow
def test_several_processes_answer_in_the_order_of_the_tasks_and_end() -> None:
    """More tasks and fewer than wait at once; the same processes take a second list."""
    with staged(Doubles, 2, "double") as results:
        for count in (4 * AHEAD + 1, 1, 0, AHEAD):
            found = list(results(range(count)))
            assert [value for value, _ in found] == [2 * n for n in range(count)]
            assert [rank for _, rank in found] == [n % 2 for n in range(count)]
    assert not multiprocessing.active_children()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "message"),
    [(1000, "task 1000 is wrong"), (2000, "ended with status -9"), (3000, "asked for 2.00 GiB")],
)
def test_an_error_or_a_kill_in_a_process_is_the_command_s_error(task: int, message: str) -> None:
    with pytest.raises(UserError, match=message), staged(Doubles, 2, "double") as results:
        list(results([1, 2, task, 4, 5, 6]))
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_ctrl_c_ends_the_processes() -> None:
    def stops() -> None:
        with staged(Doubles, 2, "double") as results:
            next(results(range(100)))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stops()
    assert not multiprocessing.active_children()


def test_tensors_on_their_way_arrive_as_they_are() -> None:
    one = torch.arange(3.0)
    assert torch.equal(on_the_way({"one": one})()["one"], one)
