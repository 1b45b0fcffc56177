"""Reading ahead in a thread: order, ends, errors, and a thread that stops."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from lit_safety.core.errors import UserError
from lit_safety.data.reading.loader import ReadAhead


def alive() -> int:
    return sum(thread.name == "read-ahead" for thread in threading.enumerate())


def test_everything_comes_in_order_and_the_thread_ends():
    found = ReadAhead(iter(range(50)), 3)
    assert list(found) == list(range(50))
    assert alive() == 0
    assert list(found) == []


def test_it_is_ahead_by_no_more_than_it_may():
    read: list[int] = []
    reached = threading.Event()

    def source() -> Iterator[int]:
        for number in range(50):
            read.append(number)
            if number == 3:
                reached.set()
            yield number

    found = ReadAhead(source(), 2)
    assert next(found) == 0
    assert reached.wait(10), "two are ready and a third is in the thread's hand"
    assert read == [0, 1, 2, 3]
    found.close()
    assert alive() == 0
    assert len(read) < 10


def test_an_error_comes_where_it_happened():
    def source() -> Iterator[int]:
        yield 1
        raise UserError("a bad shard")

    found = ReadAhead(source())
    assert next(found) == 1
    with pytest.raises(UserError, match="a bad shard"):
        next(found)
    assert alive() == 0
