"""An iterator read a little ahead by a thread, in its own order."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any, TypeVar

T = TypeVar("T")

_END = object()


class ReadAhead(Iterator[T]):
    """Hands out what `source` does, of which a thread holds up to `count` ready.

    Taking a batch from a worker process costs a few milliseconds of unpacking, which then pass beside the step instead
    of between two of them. `close` (or the end, or an error) stops the thread; nobody else reads `source` until then.

    Args:
        source: read in the thread from now on.
        count: how many are held ready.
    """

    def __init__(self, source: Iterator[T], count: int = 2) -> None:
        self._source = source
        self._ready: queue.Queue[Any] = queue.Queue(count)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._read, name="read-ahead", daemon=True)
        self._thread.start()

    def __next__(self) -> T:
        if self._closed.is_set():
            raise StopIteration
        found, error = self._ready.get()
        if found is not _END:
            return found
        self.close()
        if error is not None:
            raise error
        raise StopIteration

    def close(self) -> None:
        """Stop the thread and wait for it; what it holds is dropped."""
        self._closed.set()
        while self._thread.is_alive():
            try:  # it may be waiting for room
                self._ready.get_nowait()
            except queue.Empty:
                self._thread.join(0.01)

    def _read(self) -> None:
        failed: BaseException | None = None
        try:
            for item in self._source:
                self._ready.put((item, None))
                if self._closed.is_set():
                    return
        except BaseException as error:  # whoever reads raises it again
            failed = error
        self._ready.put((_END, failed))
