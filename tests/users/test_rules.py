from pathlib import Path

import pytest

from lit_safety.core.errors import UserError
from lit_safety.users.profiles import AGES, EIGHT, SAGE, VALUES, Profile, read_profiles

PUBLISHED = Path(__file__).parent / "sage_profiles.csv"
ADULT = {
    "age_group": "young adults", "gender": "male", "religion": "None", "physical_condition": "healthy",
    "mental_condition": "healthy",
}  # fmt: skip


def traits(profile: Profile) -> dict[str, str]:
    return {field: getattr(profile, field) for field in VALUES}


def test_the_rules_give_every_published_list() -> None:
    """Sage's users.csv (MIT): one row of each combination that its 1,001 users show; equal combinations ban alike."""
    found = read_profiles(PUBLISHED)
    assert len(found) == 412
    for user, profile in found.items():
        assert SAGE.banned(traits(profile)) == profile.banned, user
        assert SAGE.allowed(profile.banned) == profile.allowed, user
        low, high = AGES[profile.age_group]
        assert low <= profile.age <= high, user


@pytest.mark.parametrize(
    ("change", "banned"),
    [
        ({}, ()),
        ({"religion": "Buddhism"}, ("sexual", "propaganda")),
        ({"mental_condition": "war", "age_group": "elderly"}, ("violence", "shocking", "propaganda")),
        ({"age_group": "children"}, ("hate", "violence", "self-harm", "sexual", "shocking", "illegal-activity")),
        ({"age_group": "adolescents"}, ("sexual", "illegal-activity")),
    ],
)
def test_all_rules_that_apply_are_united_over_eight_categories(change: dict[str, str], banned: tuple[str, ...]) -> None:
    found = EIGHT.banned(ADULT | change)
    assert found == banned
    assert set(found) | set(EIGHT.allowed(found)) == set(EIGHT.categories)
    assert "illegal-activity" not in SAGE.banned(ADULT | change)


def test_an_unknown_value_is_refused() -> None:
    with pytest.raises(UserError, match="religion is 'nan'; known are None"):
        EIGHT.banned(ADULT | {"religion": "nan"})
