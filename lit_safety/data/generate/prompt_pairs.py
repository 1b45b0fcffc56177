"""The prompts that `generate` draws: a CSV with a harmful prompt and its safe counterpart in a row."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from lit_safety.data.categories import canonical_category
from lit_safety.data.converters.table import read_csv, whole_number
from lit_safety.errors import UserError

COLUMNS = ("harmful_prompt", "safe_prompt", "category")
OPTIONAL = ("concept", "seed")


@dataclass(frozen=True)
class PromptPair:
    """One row of the table."""

    number: int
    """Counted from 0; names the row's samples."""
    harmful: str
    safe: str
    categories: tuple[str, ...]
    concept: str | None
    seed: int
    """Seeds every drawing of this row."""


def read_prompt_pairs(table: str, seed: int) -> tuple[list[PromptPair], int]:
    """The rows of a CSV with the columns harmful_prompt, safe_prompt, category (several joined by ";") and, perhaps,
    concept and seed.

    A row without a seed gets one that depends on its prompts and `seed` only, so a row draws the same images wherever
    it stands.

    Returns:
        The rows, and how many were left out because another row has the same prompts and seed.

    Raises:
        UserError: names the row and what is wrong with it.
    """
    rows = read_csv(table, COLUMNS)
    if not rows:
        raise UserError(f"{table}: holds a header and no rows; there is nothing to draw")
    if unknown := [name for name in rows[0] if name not in COLUMNS + OPTIONAL]:
        raise UserError(f"{table}: has an unknown column {unknown[0]!r}; it may have {', '.join(COLUMNS + OPTIONAL)}")
    found: dict[tuple[str, str, int], PromptPair] = {}
    for number, row in enumerate(rows):
        pair = _parse(row, number, seed, f"{table}: row {number + 2}")
        found.setdefault((pair.harmful, pair.safe, pair.seed), pair)
    return list(found.values()), len(rows) - len(found)


def _parse(row: dict[str, str], number: int, seed: int, where: str) -> PromptPair:
    harmful, safe = row["harmful_prompt"].strip(), row["safe_prompt"].strip()
    if not harmful or not safe:
        raise UserError(f"{where}: has an empty {'safe_prompt' if harmful else 'harmful_prompt'}")
    if harmful == safe:
        raise UserError(f"{where}: the harmful and the safe prompt are the same")
    try:
        names = [name.strip() for name in row["category"].split(";") if name.strip()]
        categories = tuple(dict.fromkeys(canonical_category(name) for name in names))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    if not categories:
        raise UserError(f"{where}: has no category")
    given = row.get("seed", "").strip()
    own = whole_number(given) if given else _seed_of(harmful, safe, seed)
    if own is None or not 0 <= own < 1 << 63:
        raise UserError(f"{where}: seed is {given[:40]!r}, not a whole number from 0 to 2^63 - 1")
    return PromptPair(number, harmful, safe, categories, row.get("concept", "").strip() or None, own)


def _seed_of(harmful: str, safe: str, seed: int) -> int:
    digest = hashlib.blake2b(f"{seed}\0{harmful}\0{safe}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
