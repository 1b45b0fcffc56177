"""The eight harm categories and every spelling of them that published data uses.

CoProV2 (SafetyDPO) has the first seven; Sage (PSA) has `propaganda` instead of `illegal-activity`.
"""

from __future__ import annotations

from lit_safety.core.errors import UserError

CATEGORIES: tuple[str, ...] = (
    "hate",
    "harassment",
    "violence",
    "self-harm",
    "sexual",
    "shocking",
    "illegal-activity",
    "propaganda",
)

# Spellings that differ from the canonical id by more than case, blanks, dashes and underscores.
_ALIASES: dict[str, str] = {
    "harrasment": "harassment",  # CoProV2, as published
    "harrassment": "harassment",
    "harasment": "harassment",
    "sexuality": "sexual",  # Sage
    "sexualcontent": "sexual",
    "nudity": "sexual",
    "illegal": "illegal-activity",  # Sage's file names and I2P use the short form
    "illegalactivities": "illegal-activity",
    "illegalacts": "illegal-activity",
    "shockingcontent": "shocking",
    "hatespeech": "hate",
    "selfinjury": "self-harm",
}


def _squeeze(name: str) -> str:
    return "".join(c for c in name.casefold() if c.isalnum())


_BY_SQUEEZED: dict[str, str] = {_squeeze(name): name for name in CATEGORIES} | _ALIASES


def canonical_category(name: str) -> str:
    """The canonical id of a category under any published spelling: `"Harrasment"` -> `"harassment"`.

    Raises:
        UserError: the spelling is unknown.
    """
    found = _BY_SQUEEZED.get(_squeeze(name)) if isinstance(name, str) else None
    if found is None:
        raise UserError(f"unknown category {name!r}; known are {', '.join(CATEGORIES)}")
    return found
