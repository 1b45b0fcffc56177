from __future__ import annotations

import pytest

from lit_safety.core.categories import CATEGORIES, canonical_category
from lit_safety.core.errors import UserError

# As the papers' files spell them: CoProV2's CSV, Sage's users.csv, Sage's file names.
COPROV2 = ["Hate", "Harrasment", "Violence", "self-harm", "sexual", "Shocking", "Illegal Activity"]
SAGE = ["Hate", "Harassment", "Violence", "Self-Harm", "Sexuality", "Shocking", "Propaganda"]


def test_every_published_spelling_has_its_id() -> None:
    assert [canonical_category(name) for name in COPROV2] == list(CATEGORIES[:7])
    assert [canonical_category(name) for name in SAGE] == [*CATEGORIES[:6], "propaganda"]
    assert [canonical_category(name) for name in CATEGORIES] == list(CATEGORIES)
    assert canonical_category("illegal_activity") == "illegal-activity"


@pytest.mark.parametrize("name", ["guns", "", "violence2", None])
def test_an_unknown_spelling_is_refused_by_name(name: str) -> None:
    with pytest.raises(UserError, match=r"unknown category.*known are hate, harassment"):
        canonical_category(name)
