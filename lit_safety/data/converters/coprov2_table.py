"""CoProV2's CSV: a row for each image and category, images named `u_idx_ID.jpg` (unsafe) and `s_idx_ID.jpg` (safe)."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

from lit_safety.data.categories import canonical_category
from lit_safety.data.converters.table import read_csv
from lit_safety.errors import UserError

REQUIRED = ("prompt", "image", "category")
NAME = re.compile(r"(?P<side>[us])_idx_(?P<id>[A-Za-z0-9_-]+)\.(jpg|jpeg|png|webp)")


@dataclass
class Half:
    """One image of a pair, as several rows tell of it."""

    prompt: str
    image: str
    categories: dict[str, None] = field(default_factory=dict)


def read_halves(table: str) -> dict[str, dict[str, Half]]:
    """Pair id to its unsafe ("u") and safe ("s") half, as far as they are there.

    Raises:
        UserError: names the row that is not as published.
    """
    found: dict[str, dict[str, Half]] = {}
    for number, row in enumerate(read_csv(table, REQUIRED), start=2):
        match = NAME.fullmatch(row["image"])
        if match is None:
            raise UserError(f"{table}: row {number}: {row['image']!r} is not named u_idx_ID.jpg or s_idx_ID.jpg")
        half = found.setdefault(match["id"], {}).setdefault(match["side"], Half(row["prompt"].strip(), row["image"]))
        if not half.prompt or half.prompt != row["prompt"].strip():
            raise UserError(f"{table}: row {number}: {row['image']} has an empty prompt or two different ones")
        try:
            half.categories[canonical_category(row["category"])] = None
        except UserError as error:
            raise UserError(f"{table}: row {number}: {error}") from error
    return found


def categories_of(halves: dict[str, Half]) -> tuple[str, ...]:
    """One list for both prompts: the clean prompt is the counterpart of that harm."""
    return tuple(dict.fromkeys(name for side in "us" if side in halves for name in halves[side].categories))


def whole_pairs(found: dict[str, dict[str, Half]], left_out: Counter[str]) -> dict[str, dict[str, Half]]:
    """Those of which both halves are there; the others are counted."""
    whole = {name: halves for name, halves in found.items() if len(halves) == 2}
    if len(found) > len(whole):
        left_out["without a counterpart"] += len(found) - len(whole)
    return whole
