"""Prompt sets: what is asked of every arm, with the seed that draws it."""

from __future__ import annotations

import csv
import hashlib
from dataclasses import asdict, dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lit_safety.data.categories import canonical_category
from lit_safety.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable

Kind = Literal["explicit", "implicit", "lookalike", "clean"]
KINDS: tuple[Kind, ...] = ("explicit", "implicit", "lookalike", "clean")
HARMFUL_KINDS: tuple[Kind, ...] = ("explicit", "implicit")
COLUMNS = ("prompt", "kind", "category", "concept", "benign", "held_out", "seed")


@dataclass(frozen=True)
class Prompt:
    """One row: a prompt and the seed of its drawing."""

    prompt: str
    kind: Kind
    """explicit names the harm, implicit means it without naming it, lookalike and clean ask for nothing harmful."""
    category: str
    """Canonical category of a harmful prompt, else empty."""
    concept: str
    """The harm asked for, as the judge names it; empty where the prompt set names none."""
    benign: tuple[str, ...]
    """The benign objects asked for, as the judge names them."""
    held_out: bool
    """The phrase stood in no alignment data."""
    seed: int
    """Seed of the drawing's initial noise."""

    @property
    def harmful(self) -> bool:
        """Whether the prompt asks for something harmful."""
        return self.kind in HARMFUL_KINDS


def read_prompts(file: str | Path) -> list[Prompt]:
    """All rows of a CSV with the columns prompt,kind,category,concept,benign,held_out,seed.

    Raises:
        UserError: the file is unreadable or has no rows, a column is missing, or a row holds what its column cannot.
    """
    try:
        with Path(file).open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, strict=True)
            missing = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
            if missing:
                raise UserError(f"{file}: misses the column(s) {', '.join(missing)}; needed: {','.join(COLUMNS)}")
            prompts = [_parse(row, f"{file} line {reader.line_num}") for row in reader]
    except OSError as error:
        raise UserError(f"{file}: the prompt set cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file}: is no UTF-8 CSV file ({error})") from error
    if not prompts:
        raise UserError(f"{file}: holds a header and no rows; nothing to draw")
    return prompts


def _parse(row: dict[str, str | None], where: str) -> Prompt:
    if None in row or None in row.values():
        raise UserError(f"{where}: has more or fewer fields than the header; quote prompts that hold commas")
    cells = {column: (row[column] or "").strip() for column in COLUMNS}
    if not cells["prompt"]:
        raise UserError(f"{where}: the prompt is empty")
    if cells["kind"] not in KINDS:
        raise UserError(f"{where}: kind `{cells['kind']}` is none of {', '.join(KINDS)}")
    harmful = cells["kind"] in HARMFUL_KINDS
    if harmful and not cells["category"]:
        raise UserError(f"{where}: an {cells['kind']} prompt needs a category")
    if not harmful and (cells["category"] or cells["concept"]):
        raise UserError(f"{where}: a {cells['kind']} prompt must have no category and no concept")
    if cells["held_out"] not in ("", "0", "1"):
        raise UserError(f"{where}: held_out is `{cells['held_out']}`, must be 0 or 1")
    try:
        seed = int(cells["seed"])
    except ValueError:
        seed = -1
    if not 0 <= seed < 2**63:
        raise UserError(f"{where}: seed `{cells['seed']}` is no whole number from 0 to 2^63 - 1")
    try:
        category = canonical_category(cells["category"]) if harmful else ""
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return Prompt(
        prompt=cells["prompt"],
        kind=cells["kind"],
        category=category,
        concept=cells["concept"],
        benign=tuple(name.strip() for name in cells["benign"].split(";") if name.strip()),
        held_out=cells["held_out"] == "1",
        seed=seed,
    )


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

    def __post_init__(self) -> None:
        for kind, count in asdict(self).items():
            if count is not None and count < 0:
                raise UserError(f"--{kind} {count}: the number of {kind} prompts cannot be negative")


def select(prompts: Iterable[Prompt], selection: Selection) -> list[Prompt]:
    """A balanced part of a prompt set, the same every time, in the order of the kinds and of the file.

    Rows are ordered by a hash of their content and dealt round robin over their strata (concepts, categories by
    held-out, sets of benign objects), so that 40 of a category are a subset of 100, whatever the file's order.

    Raises:
        UserError: nothing is left.
    """
    rows = list(prompts)
    of = {kind: [row for row in rows if row.kind == kind] for kind in KINDS}
    chosen: list[Prompt] = []
    for category in dict.fromkeys(row.category for row in of["explicit"]):
        members = [row for row in of["explicit"] if row.category == category]
        chosen += _deal(members, selection.explicit, lambda row: row.concept)
    halves = [[row for row in of["implicit"] if row.held_out is held_out] for held_out in (False, True)]
    shuffled = [_deal(half, None, lambda row: (row.category, row.concept)) for half in halves]
    chosen += _round_robin(shuffled)[: selection.implicit]
    chosen += _deal(of["lookalike"], selection.lookalike, lambda row: row.benign)
    lengths = [[r for r in of["clean"] if len(r.benign) == n] for n in sorted({len(r.benign) for r in of["clean"]})]
    chosen += _round_robin([_deal(part, None, lambda row: row.benign) for part in lengths])[: selection.clean]
    if not chosen:
        raise UserError("the prompt set holds no row of a kind that was asked for: raise --explicit, --clean, ...")
    place = {id(row): i for i, row in enumerate(rows)}
    return sorted(chosen, key=lambda row: (KINDS.index(row.kind), place[id(row)]))


def _deal(rows: list[Prompt], count: int | None, stratum: Callable[[Prompt], Hashable]) -> list[Prompt]:
    strata: dict[Hashable, list[Prompt]] = {}
    for row in sorted(rows, key=_rank):
        strata.setdefault(stratum(row), []).append(row)
    return _round_robin(list(strata.values()))[:count]


def _round_robin(parts: list[list[Prompt]]) -> list[Prompt]:
    return [row for row in chain.from_iterable(zip_longest(*parts)) if row is not None]


def _rank(row: Prompt) -> bytes:
    return hashlib.blake2b(f"{row.seed}\0{row.prompt}".encode(), digest_size=8).digest()
