"""Who is asked what: every tested user gets prompts of what the user bans and allows, and harmless ones."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Literal

from lit_safety.core.categories import CATEGORIES
from lit_safety.core.errors import UserError
from lit_safety.drawing.prompts import deal

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lit_safety.drawing.prompts import Prompt
    from lit_safety.users.profiles import Profile


Part = Literal["banned", "allowed", "clean", "lookalike", "unsorted"]
PARTS: tuple[Part, ...] = ("banned", "allowed", "clean", "lookalike", "unsorted")
"""Of the last ones the prompt file does not say what they ask for."""
UNSPLIT = "users"
"""How users of a table without splits are called in a report."""


@dataclass(frozen=True)
class UserRow:
    """One prompt for one user."""

    profile: Profile
    part: Part
    """What the prompt asks for, by this user's lists."""
    prompt: Prompt

    @property
    def split(self) -> str:
        """seen: the user was in training; unseen: was not."""
        return self.profile.split or UNSPLIT


@dataclass(frozen=True)
class Counts:
    """Prompts for each user.

    Raises:
        UserError: a count is negative.
    """

    explicit: int = 4
    """Of each category that the user bans or allows."""
    implicit: int = 1
    """Of each category too."""
    clean: int = 10
    lookalike: int = 2

    def __post_init__(self) -> None:
        for kind, count in asdict(self).items():
            if count < 0:
                raise UserError(f"--{kind} {count}: the number of {kind} prompts cannot be negative")


def read_ids(ids: Sequence[str | int]) -> list[str]:
    """Users named on a command line or in a YAML file, each once.

    Raises:
        UserError: one came as a number: YAML reads 0000512 as 330, and nobody can say any more who was meant.
    """
    for one in ids:
        if not isinstance(one, str):
            raise UserError(
                f"--ids: YAML made the number {one} of an id; write ids in quotes, such as --ids '[\"0000033\"]'"
            )
    return [str(one) for one in dict.fromkeys(ids)]


def choose_users(
    profiles: Mapping[str, Profile],
    splits: Sequence[str],
    each: int | None,
    ids: Sequence[str | int] | None,
    table: str,
) -> list[Profile]:
    """The users that are tested: those named, or some of each split, the same every time.

    Args:
        profiles: all users by id.
        splits: whose users are taken, in this order.
        each: users of each split, chosen by a hash of their ids, so that 20 are a part of 50; None: all.
        ids: just these users.
        table: for messages.

    Raises:
        UserError: a user or split is not in the table.
    """
    if ids is not None:
        named = read_ids(ids)
        unknown = [user for user in named if user not in profiles]
        if unknown or not named:
            raise UserError(
                f"--ids: user {unknown[0]!r} is not in {table}" if unknown else "--ids: is empty; name a user"
            )
        return [profiles[user] for user in named]
    if each is not None and each < 1:
        raise UserError(f"--each {each}: at least 1 user of a split is needed")
    chosen = []
    for split in splits:
        members = [one for one in profiles.values() if (one.split or UNSPLIT) == split]
        if not members:
            known = dict.fromkeys(one.split or UNSPLIT for one in profiles.values())
            raise UserError(f"--splits: {table} has 0 users of the split {split!r}; its splits are {', '.join(known)}")
        chosen += sorted(members, key=lambda one: _rank(one.user_id))[:each]
    return chosen


def rows_for(users: Sequence[Profile], prompts: Sequence[Prompt], counts: Counts) -> list[UserRow]:
    """What every user is asked.

    Prompts are dealt in turn: within a split no prompt comes again before all of its kind and category were used, and
    the n-th user of every split gets the same ones. A category in neither list of a user is not asked for.

    Raises:
        UserError: the prompt set holds nothing that could be asked for.
    """
    explicit = {c: _pool(prompts, "explicit", c) for c in CATEGORIES}
    implicit = {c: _pool(prompts, "implicit", c) for c in CATEGORIES}
    clean, lookalike = _pool(prompts, "clean"), _pool(prompts, "lookalike")
    rows: list[UserRow] = []
    seen_of: dict[str, int] = {}
    for user in users:
        turn = seen_of.setdefault(user.split, 0)
        seen_of[user.split] += 1
        harmful = [
            prompt
            for category in CATEGORIES
            for pool, count in ((explicit[category], counts.explicit), (implicit[category], counts.implicit))
            for prompt in _turn(pool, turn, count)
        ]
        for prompt in harmful:
            part = part_of(user, prompt)
            if part is not None:
                rows.append(UserRow(user, part, prompt))
        rows += [UserRow(user, "clean", prompt) for prompt in _turn(clean, turn, counts.clean)]
        rows += [UserRow(user, "lookalike", prompt) for prompt in _turn(lookalike, turn, counts.lookalike)]
    rows.sort(key=lambda row: PARTS.index(row.part))  # stable: neighbours of a batch are of one kind, as elsewhere
    if not any(row.part in ("banned", "allowed") for row in rows):
        raise UserError(
            "the prompts do not ask for anything that these users ban or allow: raise --explicit, or use others"
        )
    return rows


def rows_as_asked(
    profiles: Mapping[str, Profile],
    prompts: Sequence[Prompt],
    splits: Sequence[str] | None,
    each: int | None,
    ids: Sequence[str | int] | None,
    files: tuple[str, str],
) -> tuple[list[UserRow], dict[str, int]]:
    """The rows of a prompt file that says who is asked, as Sage and PSA's evaluation files do.

    Args:
        profiles: all users by id. An id that has lost its leading zeros, as spreadsheets take them, is found too.
        prompts: of the file, each with its user.
        splits: whose rows are taken; None: all that the file asks.
        each: users of each split; None: all.
        ids: just these users.
        files: the prompt file and the table of users, for messages.

    Returns: the rows, and how many were left out by reason: harm in neither of a user's lists.

    Raises:
        UserError: a row names no user, or one who is not in the table, or nothing is left.
    """
    unnamed = [prompt for prompt in prompts if not prompt.user]
    if unnamed:
        raise UserError(
            f"--prompts {files[0]}: {len(unnamed)} of {len(prompts)} rows lack a user, such as the row of the prompt "
            f"`{unnamed[0].prompt[:60]}`; give every row its user_id, or none"
        )
    known = {str(p.user): _known(str(p.user), profiles) for p in prompts}
    strange = [user for user, found in known.items() if found is None]
    if strange:
        more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
        raise UserError(f"--prompts {files[0]}: asks {', '.join(strange[:3])}{more}, who are not in {files[1]}")
    asked = {one.user_id: one for one in known.values() if one is not None}
    if splits is None:
        splits = list(dict.fromkeys(one.split or UNSPLIT for one in asked.values()))
    chosen = {one.user_id for one in choose_users(asked, splits, each, ids, f"{files[1]} and {files[0]}")}
    rows, neither = [], 0
    for prompt in prompts:
        user = known[str(prompt.user)]
        if user is None or user.user_id not in chosen:
            continue
        part: Part | None = (
            part_of(user, prompt) if prompt.harmful else "clean" if prompt.kind == "clean" else "lookalike"
        )
        part = part if prompt.kind_said else "unsorted"
        if part is None:
            neither += 1
        else:
            rows.append(UserRow(user, part, replace(prompt, user=user.user_id)))
    if not rows:
        raise UserError(f"--prompts {files[0]}: does not ask for anything that these users ban or allow")
    rows.sort(key=lambda row: PARTS.index(row.part))
    return rows, {"rows_in_neither_list": neither} if neither else {}


def _known(user: str, profiles: Mapping[str, Profile]) -> Profile | None:
    """The user's profile; seven digits are the published form of an id."""
    return profiles.get(user) or (profiles.get(user.zfill(7)) if user.isdecimal() else None)


def part_of(user: Profile, prompt: Prompt) -> Part | None:
    """Banned when the user bans any category of a harmful prompt, allowed when all are allowed; else None."""
    asked = {prompt.category, *prompt.also}
    if asked & set(user.banned):
        return "banned"
    return "allowed" if asked <= set(user.allowed) else None


def drawn_for(row: UserRow, user: str | None) -> Prompt:
    """The row's prompt, drawn for `user`."""
    return replace(row.prompt, user=user)


def _pool(prompts: Sequence[Prompt], kind: str, category: str = "") -> list[Prompt]:
    """All prompts of a kind in the order in which they are dealt: things asked for in turn, then by hash."""
    members = [prompt for prompt in prompts if prompt.kind == kind and prompt.category == category]
    return deal(members, None, lambda prompt: (prompt.concept, prompt.held_out, len(prompt.benign)))


def _turn(pool: Sequence[Prompt], turn: int, count: int) -> list[Prompt]:
    count = min(count, len(pool))
    return [pool[(turn * count + number) % len(pool)] for number in range(count)]


def _rank(user: str) -> bytes:
    return hashlib.blake2b(user.encode(), digest_size=8).digest()
