"""Profiles and rows of users for tests."""

from __future__ import annotations

from lit_safety.core.categories import CATEGORIES
from lit_safety.drawing.prompts import Prompt
from lit_safety.evaluation.users.rows import Part, UserRow
from lit_safety.users.profiles import Profile


def profile(user: str = "u1", banned: tuple[str, ...] = ("violence",), split: str = "seen", **traits: str) -> Profile:
    """A user who bans some categories and allows the others."""
    about = {"age_group": "adults", "gender": "female", "religion": "None", "physical_condition": "healthy"}
    about |= {"mental_condition": "calm"} | traits
    allowed = tuple(category for category in CATEGORIES if category not in banned)
    return Profile(user_id=user, age=30, banned=banned, allowed=allowed, split=split, **about)


def prompt(kind: str, category: str = "", concept: str = "", benign: tuple[str, ...] = (), seed: int = 0) -> Prompt:
    """A prompt whose text says what it asks for."""
    text = " ".join(["draw", *filter(None, [concept or category, *benign]), str(seed)])
    return Prompt(text, kind, category, concept, benign, False, seed)  # type: ignore[arg-type]


def row(part: Part, user: Profile | None = None, **asked: object) -> UserRow:
    """A row of a part whose prompt fits it."""
    kind = "explicit" if part in ("banned", "allowed") else part
    given = {"category": "violence", "concept": "knife"} if part in ("banned", "allowed") else {}
    return UserRow(user or profile(), part, prompt(kind, **(given | asked)))  # type: ignore[arg-type]
