from dataclasses import dataclass
from typing import Any, Literal

import pytest
from pydantic import StrictInt, TypeAdapter

from lit_safety.core.errors import UserError
from lit_safety.core.records import Number, Text, checked


@dataclass
class Inner:
    name: Text


@dataclass
class Record:
    kind: Literal["a", "b"]
    inner: Inner
    count: StrictInt
    cost: Number | None = None
    tags: list[Text] | None = None


GIVEN: dict[str, Any] = {"kind": "a", "inner": {"name": "n"}, "count": 1}


def test_a_record_is_read() -> None:
    found = checked(TypeAdapter(Record), GIVEN | {"cost": 2, "tags": ["x"]}, "here")
    assert found == Record("a", Inner("n"), 1, 2.0, ["x"])
    assert isinstance(found.cost, float)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"kind": "c"}, "kind"), ({"inner": 3}, "inner"), ({"inner": {}}, "inner.name"), ({"count": True}, "count"),
     ({"count": 1.0}, "count"), ({"cost": float("inf")}, "cost"), ({"cost": "1"}, "cost"), ({"tags": "x"}, "tags"),
     ({"tags": ["x", "\ud800"]}, "tags.1"), ({"inner": {"name": "n" * 10000 + "\ud800"}}, "inner.name")],
)  # fmt: skip
def test_the_first_wrong_field_is_named_in_one_short_line(change: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError) as caught:
        checked(TypeAdapter(Record), GIVEN | change, "x.json")
    assert str(caught.value).startswith(f"x.json: '{named}' ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
