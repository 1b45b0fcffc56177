"""Draw several batches at a time with one pipeline."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from queue import SimpleQueue
from threading import BoundedSemaphore, Event
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from concurrent.futures import Future


Done = TypeVar("Done")
WRITERS = 2
"""Threads that turn pixels into PNG files: one is too slow for a pipeline of few steps on a GPU."""
SMALL = 50_000_000
"""A network with fewer parameters is too small for several threads; every Stable Diffusion has more."""


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Inside, one operation of torch on a CPU uses `count` threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def each_batch(
    pipe: Any, batches: Sequence[range], work: Callable[[Any, range], Done], workers: int | None
) -> Iterator[Done]:
    """The results of `work(pipe, batch)`, in the order in which they finish; several at a time for a small network on a
    CPU.

    For a small network each batch gets one thread, because several threads on one batch would mostly wait for each
    other at the end of every operation (with another busy process this was 7 times slower), and pixels would depend on
    the number of cores.

    Args:
        pipe: each worker gets a `twin` of it.
        batches: the work.
        work: is called with a pipeline and a batch.
        workers: how many batches at a time; None: as many as threads for a small network on a CPU, else 1.
    """
    import torch

    small = is_small_on_cpu(pipe)
    count = min(workers or (torch.get_num_threads() if small else 1), len(batches))
    if count == 0:
        return
    idle: SimpleQueue[Any] = SimpleQueue()
    for _ in range(count):
        idle.put(twin(pipe))

    def run(batch: range) -> Done:
        own = idle.get()
        try:
            return work(own, batch)
        finally:
            idle.put(own)

    each = 1 if small else max(1, torch.get_num_threads() // count)
    if count == 1:  # in this thread, so that a signal interrupts it
        with threads(each):
            yield from map(run, batches)
        return
    stop = Event()
    pool = ThreadPoolExecutor(count, initializer=lambda: torch.set_num_threads(each))
    with threads(each), _ended_by(stop, pipe):
        try:
            for done in as_completed([pool.submit(run, batch) for batch in batches]):
                yield done.result()
        except KeyboardInterrupt:  # Ctrl-C or SIGTERM: a batch that is being drawn ends at its next step
            stop.set()
            raise
        finally:  # on an error, batches that have begun are finished, and no others are started
            pool.shutdown(cancel_futures=True)


class Writers:
    """Threads that write images while the next ones are drawn.

    Used as a context. If it is left by an error or Ctrl-C, what is being written is finished, and nothing else is
    begun.

    Args:
        most: images that may wait; the thread that hands over more waits too, so that memory stays bounded.
    """

    def __init__(self, most: int) -> None:
        self._pool = ThreadPoolExecutor(WRITERS)
        self._room = BoundedSemaphore(max(1, most))

    def __enter__(self) -> Writers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)

    def write(self, work: Callable[..., None], *arguments: Any) -> Future[None]:
        """`work(*arguments)` in a thread."""
        self._room.acquire()
        found = self._pool.submit(work, *arguments)
        found.add_done_callback(lambda _: self._room.release())
        return found


@contextmanager
def _ended_by(stop: Event, pipe: Any) -> Iterator[None]:
    """Inside, calls of the pipeline's networks raise, in every thread, when `stop` is set."""

    def check(*_: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt

    hooks = [network.register_forward_pre_hook(check) for network in _networks(pipe)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def is_small_on_cpu(pipe: Any) -> bool:
    """Whether a pipeline draws on a CPU and has fewer than `SMALL` parameters."""
    parameters = [p for network in _networks(pipe) for p in network.parameters()]
    return all(p.device.type == "cpu" for p in parameters) and sum(p.numel() for p in parameters) < SMALL


def _networks(pipe: Any) -> list[Any]:
    import torch

    return [part for part in getattr(pipe, "components", {}).values() if isinstance(part, torch.nn.Module)]


def twin(pipe: Any) -> Any:
    """The same networks with its own scheduler and tokenizers.

    A scheduler counts the steps of its own batch. A fast tokenizer stores the padding of the last call, so two threads
    that share one would get wrong lengths.
    """
    other = copy.copy(pipe)
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        if getattr(pipe, name, None) is not None:
            setattr(other, name, copy.deepcopy(getattr(pipe, name)))
    if hasattr(pipe, "scheduler"):
        other.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    return other
