from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from lit_safety.core.errors import UserError
from lit_safety.users.profiles import AGES, EIGHT, POSSIBLE, VALUES, WEIGHTS, draw_profiles, read_profiles, sample


def test_users_are_drawn_by_the_seed_and_their_traits_go_together(tmp_path: Path) -> None:
    sample(str(tmp_path / "a.csv"), 300, seed=3, rules="eight")
    sample(str(tmp_path / "b.csv"), 300, seed=3, rules="eight")
    sample(str(tmp_path / "c.csv"), 300, seed=4)
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    users, others = read_profiles(tmp_path / "a.csv"), read_profiles(tmp_path / "c.csv")
    assert [one.age for one in users.values()] != [one.age for one in others.values()]
    assert len(users) == 300
    for one in users.values():
        assert AGES[one.age_group][0] <= one.age <= AGES[one.age_group][1]
        assert one.banned == EIGHT.banned({field: getattr(one, field) for field in VALUES})
        for (group, field), possible in POSSIBLE.items():
            assert one.age_group != group or getattr(one, field) in possible
    assert all("illegal-activity" not in (*one.banned, *one.allowed) for one in others.values())


def test_values_are_drawn_as_often_as_they_should_be() -> None:
    """4,000 users: the standard error of a share of 0.14 is sqrt(0.14 x 0.86 / 4000) = 0.0055; allowed is 0.02."""
    drawn = draw_profiles(np.random.default_rng(0), EIGHT)
    groups = Counter(next(drawn).age_group for _ in range(4000))
    for name, weight in zip(VALUES["age_group"], WEIGHTS["age_group"], strict=True):
        assert groups[name] / 4000 == pytest.approx(weight, abs=0.02)


def test_no_users_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="count must lie between 1 and"):
        sample(str(tmp_path / "a.csv"), 0)
