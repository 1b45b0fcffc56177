"""Work that goes through stages, so that a device does not wait for the processor: here, or in several processes.

While the result of one task is taken, the next one is on the device already, and one more is being read.
"""

from __future__ import annotations

import multiprocessing
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from lit_safety.core.errors import UserError
from lit_safety.core.hardware import out_of_memory
from lit_safety.core.processes import deaf_to_ctrl_c, end_all, end_with_parent

if TYPE_CHECKING:
    from torch import Tensor

#: Tasks that a process has at once: one is read, one is on the device, one's result is taken, and one waits.
AHEAD = 4
Key = TypeVar("Key")


class Stages(Protocol):
    """Work on one task after another; results depend on the task alone."""

    def start(self, task: Any) -> Any:
        """Begin what needs no device, such as decoding, in threads. `run` gets what this returns."""

    def run(self, started: Any) -> Callable[[], Any]:
        """Hand the work to the device. The function that this returns waits for the result and returns it."""

    def close(self) -> None:
        """End its threads."""


#: Tasks -> their results, in the order of the tasks.
InOrder = Callable[[Iterable[Any]], Iterator[Any]]


def in_stages(stages: Stages, tasks: Iterable[Any]) -> Iterator[Any]:
    """The results of tasks, in their order."""
    started: deque[Any] = deque()
    finish: Callable[[], Any] | None = None
    for task in tasks:
        started.append(stages.start(task))
        if len(started) < 2:
            continue
        following = stages.run(started.popleft())
        if finish is not None:
            yield finish()
        finish = following
    while started:
        following = stages.run(started.popleft())
        if finish is not None:
            yield finish()
        finish = following
    if finish is not None:
        yield finish()


def on_the_way(tensors: Mapping[Key, Tensor]) -> Callable[[], dict[Key, Tensor]]:
    """Start to copy tensors to the CPU. The function that this returns waits for the copies and returns them."""
    import torch

    # Only CUDA orders such a copy so that an event can be waited for.
    copies = {name: one.to("cpu", non_blocking=one.device.type == "cuda") for name, one in tensors.items()}
    events: list[Any] = []
    for device in {tensor.device for tensor in tensors.values() if tensor.device.type == "cuda"}:
        events.append(torch.cuda.current_stream(device).record_event())

    def wait() -> dict[Key, Tensor]:
        for event in events:
            event.synchronize()
        return copies

    return wait


@contextmanager
def staged(make: Callable[[int, int], Stages], processes: int, what: str) -> Iterator[InOrder]:
    """Inside, a function that gives the results of tasks, in their order.

    The stages are made once a process. Tasks are dealt out in turn. The processes write no files and end with this
    one, however it ends.

    Args:
        make: called with rank and number of processes; of a module, so that it can be sent to a process.
        processes: how many; 1: this one does the work itself.
        what: what they do, for messages.

    Raises:
        UserError: a task raised it, or a process was killed.
    """
    if processes == 1:
        stages = make(0, 1)
        try:
            yield lambda tasks: in_stages(stages, tasks)
        finally:
            stages.close()
        return
    import torch

    context = multiprocessing.get_context("spawn")  # a fork of a process with torch's threads may hang
    threads = max(1, torch.get_num_threads() // processes)
    pipes: list[tuple[Any, Any]] = []
    try:
        for rank in range(processes):
            ours, theirs = context.Pipe()
            work = (make, rank, processes, threads, theirs)
            process = context.Process(target=_work, args=work, daemon=True, name=f"{what} {rank}")
            with deaf_to_ctrl_c():
                process.start()
            theirs.close()  # so that the end of the process is the end of the pipe
            pipes.append((ours, process))
        yield lambda tasks: _dealt(pipes, tasks)
    finally:
        end_all(process for _, process in pipes)


def _dealt(pipes: list[tuple[Any, Any]], tasks: Iterable[Any]) -> Iterator[Any]:
    turns: deque[int] = deque()
    following = iter(tasks)

    def deal(rank: int) -> bool:
        for task in following:
            _tell(pipes[rank], (True, task))
            turns.append(rank)
            return True
        return False

    more = all(deal(number % len(pipes)) for number in range(AHEAD * len(pipes)))
    told_end = False
    while turns:
        if not more and not told_end:
            told_end = True
            for pipe in pipes:
                _tell(pipe, (False, None))
        rank = turns.popleft()
        yield _answer(pipes[rank])
        more = more and deal(rank)
    if not told_end:
        for pipe in pipes:
            _tell(pipe, (False, None))


def _tell(pipe: tuple[Any, Any], said: tuple[bool, Any]) -> None:
    with suppress(BrokenPipeError, ConnectionResetError):  # its end is noticed when its answer is read
        pipe[0].send(said)


def _answer(pipe: tuple[Any, Any]) -> Any:
    ours, process = pipe
    try:
        good, value = ours.recv()
    except (EOFError, OSError):
        process.join()
        raise UserError(
            f"the process {process.name} ended with status {process.exitcode} (killed, or out of memory?); run the "
            "same command again to continue, with fewer --processes if the memory is too small"
        ) from None
    if not good:
        raise UserError(value)
    return value


def _work(make: Callable[[int, int], Stages], rank: int, processes: int, threads: int, pipe: Any) -> None:
    """The work of one process. It ends with the process that started it, even if that one is killed."""
    import torch

    end_with_parent()
    torch.set_num_threads(threads)
    tasks: SimpleQueue[tuple[bool, Any] | None] = SimpleQueue()
    # In a thread, so that the parent never waits until a task is taken while its answer waits to be read.
    threading.Thread(target=_receive, args=(pipe, tasks), daemon=True).start()
    with suppress(KeyboardInterrupt, BrokenPipeError):  # the pipe breaks if the parent has ended
        try:
            stages = make(rank, processes)
            while True:
                for result in in_stages(stages, _until_end(tasks)):
                    pipe.send((True, result))
        except UserError as error:
            pipe.send((False, str(error)))
        except (RuntimeError, MemoryError) as error:
            if (told := out_of_memory(error, "shards")) is None:
                raise
            pipe.send((False, told))


def _receive(pipe: Any, tasks: SimpleQueue[tuple[bool, Any] | None]) -> None:
    try:
        while True:
            tasks.put(pipe.recv())
    except (EOFError, OSError):
        tasks.put(None)


def _until_end(tasks: SimpleQueue[tuple[bool, Any] | None]) -> Iterator[Any]:
    while (said := tasks.get()) is not None and said[0]:
        yield said[1]
    if said is None:
        raise KeyboardInterrupt  # the parent has ended
