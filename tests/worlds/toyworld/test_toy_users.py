from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lit_safety.core.categories import CATEGORIES
from lit_safety.core.errors import UserError
from lit_safety.data.format.manifest import load_manifest
from lit_safety.data.format.sample import PairMetadata, Sides
from lit_safety.users.profiles import VALUES, Profile, read_profiles
from lit_safety.users.table import Users
from lit_safety.worlds.toyworld.users import (
    _stored_pairs,
    choose_users,
    draw_users,
    ordered_for,
    write_splits,
    write_users_world,
)
from tests.helpers.documents import TOYWORLD

SHIPPED = TOYWORLD / "shards"


@pytest.fixture(scope="module")
def users() -> list[Profile]:
    return draw_users()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, users: list[Profile]) -> Path:
    """Users and shards from the validation pairs in place of all three parts."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "shards").mkdir()
    for part in ("train", "val", "test"):
        (folder / "shards" / part).symlink_to(SHIPPED / "val")
    write_splits(folder / "users", folder / "shards", users)
    return folder / "users"


def test_more_than_a_hundred_users_are_tested_and_half_of_them_are_not_in_training(users: list[Profile]) -> None:
    of = {split: [one for one in users if one.split == split] for split in ("train", "seen", "val", "unseen")}
    assert {split: len(found) for split, found in of.items()} == {"train": 336, "seen": 64, "val": 48, "unseen": 64}
    assert len({one.user_id for one in users}) == len(users)

    def traits(*splits: str) -> set[tuple[str, ...]]:
        return {tuple(getattr(one, field) for field in VALUES) for split in splits for one in of[split]}

    assert not traits("unseen") & traits("train", "seen", "val")
    assert not traits("val") & traits("train", "seen")
    for split in ("seen", "unseen", "val"):
        for category in CATEGORIES:
            bans = sum(category in one.banned for one in of[split])
            assert 3 <= bans <= len(of[split]) - 3, (split, category)
    assert users == draw_users()


def pair(kind: str, chosen: bool, rejected: bool, order: str = "safety") -> PairMetadata:
    return PairMetadata(
        "a gun", kind, order, ("violence",), Sides(chosen, rejected), "gun", Sides(-1.0, 0.8), Sides(0.9, 0.4)
    )


@pytest.mark.parametrize(
    ("given", "bans", "swapped"),
    [
        (pair("harmful", False, True), True, False),
        (pair("harmful", False, True), False, True),
        (pair("clean", False, True), True, False),
        (pair("clean", False, True), False, False),
        (pair("clean", False, False, "quality"), False, False),
    ],
)
def test_the_winner_is_the_harmful_image_only_for_a_harmful_prompt_and_a_user_who_allows_it(
    users: list[Profile], given: PairMetadata, bans: bool, swapped: bool
) -> None:
    user = replace(users[0], banned=("violence",) if bans else ("hate",))
    own, swap = ordered_for(given, user)
    assert swap is swapped
    assert own.user_id == user.user_id
    assert own.order == ("quality" if given.order == "quality" else "composite")
    assert own.harmful == (Sides(True, False) if swapped else given.harmful)
    assert own.cost == (Sides(0.8, -1.0) if swapped else given.cost)
    assert own.score == (Sides(0.4, 0.9) if swapped else given.score)


def test_a_pair_goes_to_users_of_both_kinds(users: list[Profile]) -> None:
    rng = np.random.default_rng(0)
    chosen = choose_users(users, ["hate"], 3, rng)
    assert ["hate" in one.banned for one in chosen] == [True] * 3 + [False] * 3
    assert len({one.user_id for one in chosen}) == 6
    assert len(choose_users(users[:1], ["hate"], 3, rng)) == 1


def test_every_pair_is_there_for_users_who_ban_and_users_who_allow(made: Path) -> None:
    """Labels read back from the shards follow the rule for the winner; the images are the pair's own, in its order."""
    world = read_profiles(made)
    plain = {key: (metadata, images) for key, metadata, images in _stored_pairs(SHIPPED / "val")}
    for split, each in (("train", 2), ("val", 1), ("test_seen", 1), ("test_unseen", 1)):
        found: dict[str, list[bool]] = defaultdict(list)
        own = read_profiles(made / split)
        assert set(Users(made / split).ids) == set(own)
        for key, metadata, images in _stored_pairs(made / split):
            pair_key, user = key.rsplit("-u", 1)
            assert metadata.user_id == user
            profile = own[user]
            assert profile == world[user]
            bans = bool(set(metadata.categories) & set(profile.banned))
            found[pair_key].append(bans)
            before, stored = plain[pair_key]
            swapped = before.prompt_kind == "harmful" and not bans
            assert metadata.harmful.chosen is swapped
            assert images == (stored[::-1] if swapped else stored)
        assert set(found) == set(plain)
        for pair_key, bans in found.items():
            if plain[pair_key][0].prompt_kind == "harmful":
                assert sorted(bans) == [False] * each + [True] * each
            else:
                assert len(bans) == 1


def test_the_same_bytes_come_again_and_whose_they_are_stands_in_the_manifest(
    made: Path, tmp_path: Path, users: list[Profile]
) -> None:
    write_splits(tmp_path / "again", made.parent / "shards", users)
    for name in ("users.csv", "users.safetensors", "val/manifest.json", "test_unseen/users.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (made / name).read_bytes()
    manifest = load_manifest(made / "test_unseen")
    assert {one.user for one in manifest.classes} <= {one.user_id for one in users if one.split == "unseen"}
    assert manifest.provenance["generator"] == "lit_safety.worlds.toyworld.users"


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match=r"mine exists .*users\.csv"):
        write_users_world(tmp_path / "mine", SHIPPED)
    with pytest.raises(UserError, match="nowhere"):
        write_users_world(tmp_path / "new", tmp_path / "nowhere")
    assert not (tmp_path / "new").exists()
