"""`lit_safety toyworld users`: users of the toy world, and its preference pairs as they order them.

Source: Personalized Safety Alignment (arXiv 2508.01151): Sage's rules for what a user bans, and for the winner of a
pair. With a clean caption the safe image wins. With a harmful caption the safe image wins for a user who bans its
category, and the harmful image wins for a user who allows it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import numpy as np

    from lit_safety.data.format.sample import PairMetadata
    from lit_safety.users.profiles import Profile


TRAIN, SEEN, VAL, UNSEEN = 400, 64, 48, 64
"""Numbers of users: in training; of these also tested; in validation; only tested."""
ROWS = {"train": 2, "val": 1, "test": 1}
"""A harmful pair goes to this many users who ban its category and to as many who allow it; a clean pair goes to one."""


def draw_users(train: int = TRAIN, seen: int = SEEN, val: int = VAL, unseen: int = UNSEEN) -> list[Profile]:
    """The world's users.

    A user of validation or of the unseen never shares all traits except age with a training user.
    """
    from dataclasses import replace

    from lit_safety.users.profiles import EIGHT, draw_profiles
    from lit_safety.worlds.toyworld.seeds import stream

    drawn = draw_profiles(stream("users", 0), EIGHT)
    users: list[Profile] = []
    taken: set[tuple[str, ...]] = set()
    for split, count in (("seen", seen), ("train", train - seen), ("val", val), ("unseen", unseen)):
        kept = frozenset() if split in ("seen", "train") else frozenset(taken)
        for _ in range(count):
            one = next(profile for profile in drawn if _traits(profile) not in kept)
            taken.add(_traits(one))
            users.append(replace(one, user_id=f"{len(users) + 1:07d}", split=split))
    return users


def _traits(profile: Profile) -> tuple[str, ...]:
    from lit_safety.users.profiles import VALUES

    return tuple(getattr(profile, field) for field in VALUES)


def choose_users(
    users: Sequence[Profile], categories: Iterable[str], each: int, rng: np.random.Generator
) -> list[Profile]:
    """`each` users who ban one of the categories and as many who allow all; without categories `each` of all users."""
    about = set(categories)
    groups = [[u for u in users if about & set(u.banned)], [u for u in users if not about & set(u.banned)]]
    picked = [rng.permutation(len(group))[:each] for group in groups]
    return [group[n] for group, numbers in zip(groups, picked, strict=True) for n in numbers]


def ordered_for(pair: PairMetadata, user: Profile) -> tuple[PairMetadata, bool]:
    """The pair's metadata in this user's order, and whether chosen and rejected were swapped."""
    from dataclasses import replace

    from lit_safety.data.format.sample import Sides

    def turned(sides: Any) -> Any:
        return Sides(sides.rejected, sides.chosen) if swap and sides is not None else sides

    allowed = not set(pair.categories) & set(user.banned)
    swap = pair.prompt_kind == "harmful" and allowed and bool(pair.harmful.rejected) and not pair.harmful.chosen
    own = replace(
        pair,
        order=pair.order if pair.order == "quality" else "composite",
        harmful=turned(pair.harmful), cost=turned(pair.cost), score=turned(pair.score), user_id=user.user_id,
    )  # fmt: skip
    return own, swap


def write_users_world(out: Path = Path("data/toyworld/users"), shards: Path = Path("data/toyworld/shards")) -> None:
    """Write the toy world's users and its pairs as they order them: users.csv, users.safetensors and shards.

    There are 400 users in training, of whom 64 are also tested (`seen`), 64 who are only tested (`unseen`) and 48 for
    validation. Every harmful pair goes to users who ban its category and to users who allow it. Folders: train, val,
    test_seen, test_unseen, each with its own users next to its shards. No image is drawn again, so it takes seconds,
    and it gives the same bytes every time.

    Args:
        out: The folder to write; an older one of this command is replaced.
        shards: The toy world's pairs: a folder with train, val and test.
    """
    from lit_safety.core.errors import UserError
    from lit_safety.core.files import atomic_folder
    from lit_safety.users.profiles import PROFILES_FILE

    if out.exists() and not (out / PROFILES_FILE).is_file():
        raise UserError(f"{out} exists and holds no {PROFILES_FILE}: it is not replaced; name another folder")
    users = draw_users()
    with atomic_folder(out) as partial:
        counts = write_splits(partial, shards, users)
    for name, count in counts.items():
        print(f"{out / name}: {count} pairs")
    print(f"{out / PROFILES_FILE}: {len(users)} users")


def write_splits(folder: Path, shards: Path, users: Sequence[Profile]) -> dict[str, int]:
    """Write users and shards into an empty folder; returns the number of pairs by split."""
    from lit_safety.users.embeddings import project
    from lit_safety.users.profiles import PROFILES_FILE, write_profiles
    from lit_safety.users.table import write_users
    from lit_safety.worlds.held_out import check_held_out
    from lit_safety.worlds.toyworld.captions import held_out

    counts: dict[str, int] = {}
    for name, part, splits in (
        ("train", "train", ("train", "seen")),
        ("val", "val", ("val",)),
        ("test_seen", "test", ("seen",)),
        ("test_unseen", "test", ("unseen",)),
    ):
        own = [user for user in users if user.split in splits]
        counts[name] = _write_shards(folder / name, shards / part, part, own)
        if part != "test":
            check_held_out(held_out(), [folder / name])
        write_users(folder / name, project(own))
        write_profiles(folder / name / PROFILES_FILE, own)
    write_users(folder, project(users))
    write_profiles(folder / PROFILES_FILE, users)
    return counts


def _write_shards(folder: Path, source: Path, part: str, users: Sequence[Profile]) -> int:
    from lit_safety.data.format.writer import ShardWriter
    from lit_safety.worlds.toyworld.seeds import SEEDS, stream

    provenance: dict[str, Any] = {
        "generator": "lit_safety.worlds.toyworld.users",
        "pairs": f"the toy world's, part {part}; drawn scenes with ground truth",
        "winner": "clean prompt: the safe image; harmful prompt: the safe image if the user bans the category, else "
        "the harmful one; two safe images: the better drawn one",
        "users": len(users),
    }
    seeds = {"first": SEEDS["users"].start, "last": SEEDS["users"].stop - 1}
    with ShardWriter(folder, samples_per_shard=200, provenance=provenance, seeds=seeds) as writer:
        for index, (key, pair, images) in enumerate(_stored_pairs(source)):
            rng = stream("users", 1 + 100_000 * tuple(ROWS).index(part) + index)
            # A clean pair teaches the same for every user; the hard part is to learn the differences between users.
            owners = [users[int(rng.integers(len(users)))]]
            if pair.prompt_kind == "harmful":
                owners = choose_users(users, pair.categories, ROWS[part], rng)
            for user in owners:
                own, swap = ordered_for(pair, user)
                writer.write(f"{key}-u{user.user_id}", own, *(reversed(images) if swap else images))
        return len(writer)


def _stored_pairs(source: Path) -> Iterator[tuple[str, PairMetadata, tuple[bytes, bytes]]]:
    """Key, metadata and the bytes of both images of every pair."""
    from lit_safety.data.format.sample import SIDES, parse_metadata
    from lit_safety.data.reading.source import open_source

    opened = open_source(str(source), "shards")
    for number in range(len(opened.paths)):
        shard = opened.open_shard(number)
        try:
            for row in range(opened.manifest.shardlist[number].nsamples):
                key, members = shard.read(row)
                pair = parse_metadata(members["json"], shard.where(row))
                sides = [next(data for name, data in members.items() if name.startswith(f"{side}.")) for side in SIDES]
                yield key, pair, (sides[0], sides[1])
        finally:
            shard.close()
