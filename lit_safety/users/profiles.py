"""Users' profiles as Sage publishes them: `users.csv`, with a user's id before and the split behind its columns.

Source: Personalized Safety Alignment (arXiv 2508.01151). The table comes from somewhere else: its lists are parsed as
literals, never evaluated, and "None" is a text: a religion that a reader turned into a missing value is an error.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lit_safety.core.categories import CATEGORIES, canonical_category
from lit_safety.core.errors import Complaints, UserError
from lit_safety.core.files import write_atomic
from lit_safety.core.tables import csv_lines, read_csv

PROFILES_FILE = "users.csv"
#: train: in training alone; seen: in training, and tested; unseen: tested alone. A published table has no splits: "".
SPLITS: tuple[str, ...] = ("train", "seen", "unseen", "val", "")
COLUMNS: tuple[str, ...] = (
    "Age", "Age_Group", "Gender", "Religion", "Physical_Condition", "Mental_Condition",
    "Banned_Categories", "Allowed_Categories",
)  # fmt: skip
_MAX_TEXT = 1000
_MAX_AGE = 150
#: What other programs write where they lost a value; "None" is no such word but a published religion.
_LOST = frozenset({"", "nan", "null", "n/a", "na", "<na>"})


@dataclass(frozen=True)
class Profile:
    """Who a user is and what the user bans."""

    user_id: str
    age: int
    """Years."""
    age_group: str
    gender: str
    religion: str
    """ "None" is a text: without religion."""
    physical_condition: str
    mental_condition: str
    banned: tuple[str, ...]
    """Canonical ids, in the order of `CATEGORIES`."""
    allowed: tuple[str, ...]
    split: str = ""
    """One of `SPLITS`."""


def read_profiles(path: str | Path) -> dict[str, Profile]:
    """The profiles of a table by user id, in its order.

    Args:
        path: `users.csv`, or the folder that holds it. Without the column User_ID, as published, the n-th row is user
            n, in seven digits; without Split, the split is "".

    Raises:
        UserError: the table cannot be read, a value is missing or no number, a list is not a list of known categories
            or contradicts the other; names row and user.
    """
    path = Path(path)
    table = path / PROFILES_FILE if path.is_dir() else path
    found: dict[str, Profile] = {}
    complaints = Complaints(str(table))
    for number, row in enumerate(read_csv(str(table), COLUMNS, ("User_ID", "Split")), start=1):
        user = row.get("User_ID", f"{number:07d}").strip()
        where = f"{table}: row {number + 1}: user {user!r}"
        with complaints.gather():
            if user.casefold() in _LOST or len(user) > _MAX_TEXT:
                raise UserError(f"{where}: is not an id of a user")
            if user in found:
                raise UserError(f"{where}: stands in the table twice")
            found[user] = _profile(user, row, where)
    complaints.complain()
    if not found:
        raise UserError(f"{table}: holds no user")
    return found


def write_profiles(path: Path, profiles: Iterable[Profile]) -> Path:
    """Write a table that `read_profiles` reads, in one step."""
    rows: list[list[object]] = [["User_ID", *COLUMNS, "Split"]]
    for one in profiles:
        rows.append(
            [
                one.user_id, one.age, one.age_group, one.gender, one.religion, one.physical_condition,
                one.mental_condition, list(one.banned), list(one.allowed), one.split,
            ]
        )  # fmt: skip
    return write_atomic(path, csv_lines(rows).encode("utf-8"))


def parse_category_list(text: str, where: str) -> tuple[str, ...]:
    """The categories of a list written as a Python literal, such as "['Sexuality', 'Hate']", in canonical order.

    Raises:
        UserError: it is not a list of texts, or a category is unknown; names `where`.
    """
    try:
        found = ast.literal_eval(text) if len(text) < _MAX_TEXT else None
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise UserError(f"{where}: {text[:60]!r} is not a list of categories") from error
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise UserError(f"{where}: {text[:60]!r} is not a list of categories")
    try:
        named = {canonical_category(name) for name in found}
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return tuple(name for name in CATEGORIES if name in named)


def _profile(user: str, row: dict[str, str], where: str) -> Profile:
    banned = parse_category_list(row["Banned_Categories"], f"{where}: Banned_Categories")
    allowed = parse_category_list(row["Allowed_Categories"], f"{where}: Allowed_Categories")
    if both := sorted(set(banned) & set(allowed)):
        raise UserError(f"{where}: {both[0]!r} is both banned and allowed")
    split = row.get("Split", "").strip()
    if split not in SPLITS:
        raise UserError(f"{where}: Split is {split!r}; known are {', '.join(name for name in SPLITS if name)}")
    return Profile(
        user_id=user,
        age=_age(row["Age"], where),
        age_group=_text(row, "Age_Group", where),
        gender=_text(row, "Gender", where),
        religion=_text(row, "Religion", where),
        physical_condition=_text(row, "Physical_Condition", where),
        mental_condition=_text(row, "Mental_Condition", where),
        banned=banned,
        allowed=allowed,
        split=split,
    )


def _text(row: dict[str, str], column: str, where: str) -> str:
    text = row[column].strip()
    if text.casefold() in _LOST:
        hint = '; write "None" for no religion, and read the table with texts kept as they are' * (column == "Religion")
        raise UserError(f"{where}: {column} is missing ({row[column]!r}){hint}")
    if len(text) > _MAX_TEXT:
        raise UserError(f"{where}: {column} is over {_MAX_TEXT} characters long")
    return text


def _age(text: str, where: str) -> int:
    try:
        age = float(text)
    except ValueError as error:
        raise UserError(f"{where}: Age is {text[:60]!r}, not a number of years") from error
    if not (0 <= age <= _MAX_AGE and age == int(age)):  # nan compares as false
        raise UserError(f"{where}: Age is {text[:60]!r}, not a whole number from 0 to {_MAX_AGE}")
    return int(age)
