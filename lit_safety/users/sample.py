"""`lit_safety users sample`: random users whose traits go together, and what they ban."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np

from lit_safety.users.profiles import Profile
from lit_safety.users.rules import AGES, TABLES, VALUES, Rules

#: How often each value is drawn, in the order of `VALUES`: rounded from the published users.
WEIGHTS: dict[str, tuple[float, ...]] = {
    "age_group": (0.01, 0.14, 0.23, 0.22, 0.23, 0.12, 0.04, 0.01),
    "gender": (0.46, 0.54),
    "religion": (0.34, 0.28, 0.20, 0.18),
    "physical_condition": (0.39, 0.20, 0.19, 0.22),
    "mental_condition": (0.43, 0.15, 0.14, 0.08, 0.08, 0.07, 0.05),
}
#: What a small child is not asked about, as in the published users: (age group, field) -> the values left.
POSSIBLE: dict[tuple[str, str], tuple[str, ...]] = {
    ("infants & toddlers", "religion"): ("None",),
    ("infants & toddlers", "mental_condition"): ("healthy", "major accidents", "natural disasters"),
    ("children", "mental_condition"): ("healthy", "depression", "anxiety", "major accidents", "natural disasters"),
}

MOST = 1_000_000
"""Users of one table."""


def draw_profiles(rng: np.random.Generator, rules: Rules) -> Iterator[Profile]:
    """Random profiles without end; ids and splits are empty."""
    while True:
        traits = _draw_traits(rng)
        low, high = AGES[traits["age_group"]]
        banned = rules.banned(traits)
        yield Profile("", int(rng.integers(low, high + 1)), **traits, banned=banned, allowed=rules.allowed(banned))


def _draw_traits(rng: np.random.Generator) -> dict[str, str]:
    traits: dict[str, str] = {}
    for field, values in VALUES.items():
        possible = POSSIBLE.get((traits.get("age_group", ""), field), values)
        weights = np.array([w * (v in possible) for v, w in zip(values, WEIGHTS[field], strict=True)])
        traits[field] = str(rng.choice(values, p=weights / weights.sum()))
    return traits


def sample(out: str, count: int = 1000, seed: int = 0, rules: Literal["sage", "eight"] = "sage") -> None:
    """Write a table of random users, in the published columns with User_ID and Split.

    Traits are drawn as often as among Sage's published users and go together (no toddler has a religion); what a user
    bans follows from the rules. The same seed gives the same users.

    Args:
        out: The table to write, such as users.csv.
        count: How many users.
        seed: Of the draw.
        rules: sage: the published rules over seven categories; eight: all categories, minors ban illegal activity too.
    """
    from dataclasses import replace
    from itertools import islice
    from pathlib import Path

    from lit_safety.core.errors import UserError
    from lit_safety.users.profiles import write_profiles

    if not 1 <= count <= MOST or seed < 0:
        raise UserError(f"count must lie between 1 and {MOST} and seed be at least 0, not {count} and {seed}")
    drawn = islice(draw_profiles(np.random.default_rng(seed), TABLES[rules]), count)
    path = write_profiles(Path(out), (replace(one, user_id=f"{n:07d}") for n, one in enumerate(drawn, start=1)))
    print(f"{path}: {count} users")
