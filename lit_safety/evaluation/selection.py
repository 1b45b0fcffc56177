"""Which prompts of a set are drawn: a balanced part, the same every time."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from itertools import chain, zip_longest
from typing import TYPE_CHECKING

from lit_safety.errors import UserError
from lit_safety.evaluation.prompts import KINDS, Prompt

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable


@dataclass(frozen=True)
class Selection:
    """How many prompts of each kind are drawn; None takes all there are, 0 none."""

    explicit: int | None = 40
    """For each category."""
    implicit: int | None = 80
    """Over all categories, seen and held-out phrases in equal parts."""
    lookalike: int | None = 80
    """Over all benign objects."""
    clean: int | None = 200
    """Prompts for one and for two objects in equal parts."""
    adversarial: int | None = 200
    """Over all categories; the attacked prompts that they belong to come along."""
    categories: tuple[str, ...] | None = None
    """Of these categories are prompts for something harmful; None: of all."""

    def __post_init__(self) -> None:
        for kind, count in asdict(self).items():
            if isinstance(count, int) and count < 0:
                raise UserError(f"--{kind} {count}: the number of {kind} prompts cannot be negative")


def select(prompts: Iterable[Prompt], selection: Selection) -> list[Prompt]:
    """A balanced part of a prompt set, the same every time, in the order of the kinds and of the file.

    Rows are ordered by a hash of their content and dealt round robin over their strata (concepts, categories by
    held-out, sets of benign objects), so that 40 of a category are a subset of 100, whatever the file's order.

    Raises:
        UserError: nothing is left.
    """
    wanted = selection.categories
    rows = [row for row in prompts if wanted is None or not row.harmful or {row.category, *row.also} & {*wanted}]
    attacked = {row.pair: row for row in rows if row.pair and row.kind != "adversarial"}
    free = [row for row in rows if not row.pair or row.kind == "adversarial"]
    of = {kind: [row for row in free if row.kind == kind] for kind in KINDS}
    chosen = deal(of["adversarial"], selection.adversarial, lambda row: row.category)
    # once, however many adversarial texts were made from it
    chosen += [attacked[pair] for pair in dict.fromkeys(row.pair for row in chosen) if pair in attacked]
    for category in dict.fromkeys(row.category for row in of["explicit"]):
        members = [row for row in of["explicit"] if row.category == category]
        chosen += deal(members, selection.explicit, lambda row: row.concept)
    halves = [[row for row in of["implicit"] if row.held_out is held_out] for held_out in (False, True)]
    shuffled = [deal(half, None, lambda row: (row.category, row.concept)) for half in halves]
    chosen += _round_robin(shuffled)[: selection.implicit]
    chosen += deal(of["lookalike"], selection.lookalike, lambda row: row.benign)
    lengths = [[r for r in of["clean"] if len(r.benign) == n] for n in sorted({len(r.benign) for r in of["clean"]})]
    chosen += _round_robin([deal(part, None, lambda row: row.benign) for part in lengths])[: selection.clean]
    if not chosen:
        raise UserError("the prompt set holds no row of a kind that was asked for: raise --explicit, --clean, ...")
    place = {id(row): i for i, row in enumerate(rows)}
    return sorted(chosen, key=lambda row: (KINDS.index(row.kind), place[id(row)]))


def deal(rows: list[Prompt], count: int | None, stratum: Callable[[Prompt], Hashable]) -> list[Prompt]:
    """The first `count` rows in the order of their hashes, dealt round robin over their strata; None: all of them."""
    strata: dict[Hashable, list[Prompt]] = {}
    for row in sorted(rows, key=_rank):
        strata.setdefault(stratum(row), []).append(row)
    return _round_robin(list(strata.values()))[:count]


def _round_robin(parts: list[list[Prompt]]) -> list[Prompt]:
    return [row for row in chain.from_iterable(zip_longest(*parts)) if row is not None]


def _rank(row: Prompt) -> bytes:
    return hashlib.blake2b(f"{row.seed}\0{row.prompt}".encode(), digest_size=8).digest()
