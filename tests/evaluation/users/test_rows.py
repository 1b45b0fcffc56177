from collections import Counter
from dataclasses import replace

import pytest

from lit_safety.core.errors import UserError
from lit_safety.evaluation.users.rows import Counts, choose_users, part_of, rows_for
from tests.helpers.user_profiles import profile, prompt

USERS = {
    "a": profile("a", ("violence", "hate"), "seen"),
    "b": profile("b", ("hate",), "seen"),
    "c": profile("c", (), "unseen"),
    "d": profile("d", ("violence",), "train"),
}
PROMPTS = [
    *(prompt("explicit", "violence", concept, seed=n) for n in range(4) for concept in ("gun", "knife")),
    *(prompt("explicit", "hate", "torch", seed=n) for n in range(3)),
    *(prompt("implicit", "violence", "gun", seed=10 + n) for n in range(2)),
    *(prompt("clean", benign=("car",), seed=20 + n) for n in range(6)),
    *(prompt("lookalike", benign=("dice",), seed=30 + n) for n in range(2)),
]  # fmt: skip


def test_every_user_gets_all_parts_by_the_own_lists():
    rows = rows_for(list(USERS.values())[:3], PROMPTS, Counts(explicit=2, implicit=1, clean=2, lookalike=1))
    counted = Counter((row.profile.user_id, row.part) for row in rows)
    assert counted == {
        ("a", "banned"): 5, ("b", "banned"): 2, ("b", "allowed"): 3, ("c", "allowed"): 5,
        **{(user, "clean"): 2 for user in "abc"}, **{(user, "lookalike"): 1 for user in "abc"},
    }  # fmt: skip
    for row in rows:
        if row.part in ("banned", "allowed"):
            assert (row.prompt.category in row.profile.banned) == (row.part == "banned")
    assert rows_for(list(USERS.values())[:3], PROMPTS, Counts(2, 1, 2, 1)) == rows


def test_no_prompt_comes_twice_within_a_split_and_splits_are_asked_the_same():
    users = [profile(name, ("hate",), split) for split in ("seen", "unseen") for name in (f"{split}{n}" for n in "123")]
    rows = rows_for(users, PROMPTS, Counts(explicit=2, implicit=0, clean=2, lookalike=0))
    for part, category in (("allowed", "violence"), ("clean", "")):
        asked = {
            split: [r.prompt for r in rows if (r.split, r.part, r.prompt.category) == (split, part, category)]
            for split in ("seen", "unseen")
        }
        assert len(asked["seen"]) == len(set(asked["seen"])) == 6
        assert asked["seen"] == asked["unseen"]
    both = [r.prompt.concept for r in rows if r.profile.user_id == "seen1" and r.part == "allowed"]
    assert sorted(both) == ["gun", "knife"]  # things in turn


def test_parts_of_a_prompt_of_several_categories():
    about = prompt("explicit", "violence", "gun")
    assert part_of(USERS["a"], about) == "banned"
    assert part_of(USERS["b"], about) == "allowed"
    assert part_of(USERS["b"], replace(about, also=("hate",))) == "banned"
    assert part_of(replace(USERS["b"], allowed=()), about) is None


def test_users_are_chosen_by_split_the_same_every_time():
    many = {f"{n:03d}": profile(f"{n:03d}", split=("seen", "unseen")[n % 2]) for n in range(40)}
    chosen = choose_users(many, ["unseen", "seen"], 5, None, "t.csv")
    assert [user.split for user in chosen] == ["unseen"] * 5 + ["seen"] * 5
    more = choose_users(dict(reversed(many.items())), ["unseen", "seen"], 8, None, "t.csv")
    assert chosen[:5] == more[:5]
    assert len(choose_users(many, ["seen"], None, None, "t.csv")) == 20
    assert choose_users(USERS, ["seen"], 1, ["c", "a", "c"], "t.csv") == [USERS["c"], USERS["a"]]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ((["absent"], None, None), "--splits: t.csv .*'absent'.* seen, unseen, train"),
        ((["seen"], None, ["zoe"]), "user 'zoe' is not in t.csv"),
        ((["seen"], None, []), "--ids: .*empty"),
        # what YAML makes of [0000512]
        ((["seen"], None, [330]), "made the number 330 of an id; write ids in quotes"),
        ((["seen"], 0, None), "--each 0"),
    ],
)
def test_bad_choices_are_named(given: tuple, says: str):
    with pytest.raises(UserError, match=says):
        choose_users(USERS, *given, "t.csv")


def test_nothing_to_ask_is_an_error():
    with pytest.raises(UserError, match="anything that these users ban or allow"):
        rows_for(list(USERS.values()), [p for p in PROMPTS if p.kind == "clean"], Counts())
    with pytest.raises(UserError, match="--clean -1"):
        Counts(clean=-1)
