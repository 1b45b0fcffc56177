"""Which samples of the shards are used: filters by category, kind, order and user, from the manifest alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lit_safety.core.categories import canonical_category
from lit_safety.core.errors import UserError
from lit_safety.data.format.manifest import SampleClass, Shard
from lit_safety.data.format.sample import ORDERS, PROMPT_KINDS

if TYPE_CHECKING:
    from lit_safety.data.reading.source import Source


@dataclass(frozen=True)
class Filter:
    """The conditions for a sample to be used; None: no condition."""

    categories: tuple[str, ...] | None = None
    """At least one of these; pairs without a category are left out."""
    kinds: tuple[str, ...] | None = None
    orders: tuple[str, ...] | None = None
    users: tuple[str, ...] | None = None
    """Ids of users; pairs without a user are left out."""
    uncategorised: bool = field(default=False, repr=False)  # a resumed run compares the repr
    """With `categories`, also pairs without a category."""

    @classmethod
    def of(
        cls,
        categories: Sequence[str] | None,
        kinds: Sequence[str] | None,
        orders: Sequence[str] | None,
        users: Sequence[str] | None = None,
        key: str = "data.init_args",
    ) -> Filter:
        """Check the YAML's values: categories under any spelling, kinds and orders as they stand in the
        shards.

        Raises:
            UserError: names the key and what it may hold.
        """
        for name, given, allowed in (("kinds", kinds, PROMPT_KINDS), ("orders", orders, ORDERS)):
            for value in given or ():
                if value not in allowed:
                    raise UserError(f"{key}.{name} holds {value!r}; it may hold {', '.join(allowed)}")
        for name, given in (("categories", categories), ("kinds", kinds), ("orders", orders), ("users", users)):
            if given is not None and not given:
                raise UserError(f"{key}.{name} is an empty list; leave it out (null) to take every sample")
        try:
            chosen = None if categories is None else tuple(canonical_category(name) for name in categories)
        except UserError as error:
            raise UserError(f"{key}.categories: {error}") from error
        rest = [None if given is None else tuple(given) for given in (kinds, orders, users)]
        return cls(chosen, rest[0], rest[1], rest[2])

    def __bool__(self) -> bool:
        return any(one is not None for one in (self.categories, self.kinds, self.orders, self.users))

    @cached_property
    def _users(self) -> frozenset[str | None]:
        """As a set: a user's id is looked up once for every user that the shards know."""
        return frozenset(self.users or ())

    def takes(self, one: SampleClass) -> bool:
        return (
            (
                self.categories is None
                or any(name in self.categories for name in one.categories)
                or (self.uncategorised and not one.categories)
            )
            and (self.kinds is None or one.kind in self.kinds)
            and (self.orders is None or one.order in self.orders)
            and (self.users is None or one.user in self._users)
        )


@dataclass(frozen=True)
class Selection:
    """The used samples of each shard."""

    counts: tuple[int, ...]
    """How many of each shard."""
    numbers: tuple[NDArray[np.int64], ...] | None
    """Their numbers in the shard; None: all."""

    @property
    def total(self) -> int:
        return sum(self.counts)

    def part(self, start: int, stop: int) -> Selection:
        """Only the shards [start, stop); shards keep their numbers."""
        counts = tuple(count if start <= shard < stop else 0 for shard, count in enumerate(self.counts))
        return Selection(counts, self.numbers)

    def number(self, shard: int, index: int) -> int:
        """The number, in its shard, of the shard's `index`-th used sample."""
        return index if self.numbers is None else int(self.numbers[shard][index])


def take(source: Source, wanted: Filter) -> Selection:
    """Apply a filter; the result may be empty."""
    shards: Sequence[Shard] = source.manifest.shardlist
    if not wanted:
        return Selection(tuple(shard.nsamples for shard in shards), None)
    classes = source.manifest.classes
    if any(shard.classes is None for shard in shards):  # a manifest that another program wrote
        from lit_safety.data.reading.source import scan

        scanned = scan(source.paths)
        shards, classes = scanned.shardlist, scanned.classes
    taken = np.array([wanted.takes(one) for one in classes], dtype=bool)
    numbers = tuple(np.flatnonzero(taken[np.array(s.classes, dtype=np.int64)]) for s in shards)
    return Selection(tuple(len(one) for one in numbers), numbers)


def select(source: Source, wanted: Filter) -> Selection:
    """Apply a filter.

    Raises:
        UserError: no sample is left; says what the shards hold.
    """
    chosen = take(source, wanted)
    if chosen.total == 0:
        asked = ", ".join(
            f"{name}: {list(value)}"
            for name in ("categories", "kinds", "orders", "users")
            if (value := getattr(wanted, name)) is not None
        )
        held = {name: counts for name, counts in source.manifest.counts().items() if name != "label"}
        why = f"no sample is left after the filter ({asked}); they hold {held}" if asked else "they hold 0 samples"
        raise UserError(f"{source.key}: {source.given}: {why}")
    return chosen
