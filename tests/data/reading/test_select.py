"""Filters of samples by what the manifest says of them."""

from __future__ import annotations

from lit_safety.data.format.manifest import SampleClass
from lit_safety.data.reading.select import Filter


class Counted(str):
    """A user's id that counts how often one is compared with another."""

    compared = 0
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        Counted.compared += 1
        return str.__eq__(self, other)  # type: ignore[no-any-return, arg-type]


def test_a_filter_of_many_users_is_linear_in_their_number():
    """Each user of the shards is looked up once, not compared with each user that is asked for."""
    count = 2000
    wanted = Filter.of(None, None, None, [Counted(f"u{n}") for n in range(0, 2 * count, 2)])
    classes = [
        SampleClass(kind="clean", categories=(), order="safety", user=Counted(f"u{n}"), label=None)
        for n in range(count)
    ]
    Counted.compared = 0
    taken = [wanted.takes(one) for one in classes]
    assert taken == [n % 2 == 0 for n in range(count)]
    assert Counted.compared < 3 * count
