"""A profile as a text that a language model reads.

Fields are named and filled as in the published template of Personalized Safety Alignment (arXiv 2508.01151), which fits
too: its adapters expect a user's lists to be written as a Python list of Sage's names, `['Sexuality', 'Violence']`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from lit_safety.core.errors import UserError
from lit_safety.core.text import decode_text
from lit_safety.users.profiles import Profile

_FIELD = re.compile(r"<<([A-Z_]+)>>")
_MAX_BYTES = 1 << 16
#: What a template may name; the last two are ours, the lists in plain words.
FIELDS = (
    "AGE", "AGE_GROUP", "GENDER", "RELIGION", "PHYSICAL", "MENTAL", "BANNED", "ALLOWED", "BANNED_WORDS",
    "ALLOWED_WORDS",
)  # fmt: skip


def read_template(path: str | Path | None = None) -> str:
    """A template's text; None: the one of this package.

    Raises:
        UserError: it cannot be read, names an unknown field, or says neither what is banned nor who the user is.
    """
    if path is None:
        return (resources.files("lit_safety.users") / "templates" / "profile.txt").read_text("utf-8")
    try:
        with open(path, "rb") as file:
            text = decode_text(file.read(_MAX_BYTES + 1), str(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    named = _FIELD.findall(text)
    known = ", ".join(f"<<{name}>>" for name in FIELDS)
    if unknown := [name for name in named if name not in FIELDS]:
        raise UserError(f"{path}: unknown field <<{unknown[0]}>>; known are {known}")
    if not named or len(text) > _MAX_BYTES:
        raise UserError(f"{path}: is not a template of a profile: it names no field of {known}, or is over 64 KiB")
    return text


def fill(template: str, profile: Profile, none_as_nan: bool = False) -> str:
    """The template's text with this profile's values.

    Args:
        template: as `read_template` gives it.
        profile: whose values.
        none_as_nan: write `nan` for a trait that is "None", as the published texts have it: they were filled with a
            table that pandas had read, which takes "None" for a missing value.
    """

    def trait(text: str) -> str:
        return "nan" if none_as_nan and text == "None" else text

    values = {
        "AGE": str(profile.age),
        "AGE_GROUP": trait(profile.age_group),
        "GENDER": trait(profile.gender),
        "RELIGION": trait(profile.religion),
        "PHYSICAL": trait(profile.physical_condition),
        "MENTAL": trait(profile.mental_condition),
        "BANNED": _as_published(profile.banned),
        "ALLOWED": _as_published(profile.allowed),
        # A list that is empty says so: an empty line would say nothing.
        "BANNED_WORDS": ", ".join(profile.banned) or "nothing",
        "ALLOWED_WORDS": ", ".join(profile.allowed) or "nothing",
    }
    # In one pass: a value that looks like a field is not filled in again.
    return _FIELD.sub(lambda match: values[match[1]], template)


def _as_published(categories: Sequence[str]) -> str:
    """The list as it stands in Sage's users.csv: names with capitals, by the alphabet."""
    return str(sorted("Sexuality" if name == "sexual" else name.title() for name in categories))
