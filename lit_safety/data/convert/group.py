"""`lit_safety shards group`: joins the pairs of a prompt to a group of all their images."""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import TYPE_CHECKING, Any

from lit_safety.core.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lit_safety.data.format.sample import ImageFacts, PairMetadata
    from lit_safety.data.format.tar_index import OpenShard
    from lit_safety.data.reading.source import Source

    #: A sample's shard and its number in the shard.
    Place = tuple[int, int]

#: Number of shards that are open at the same time: a prompt's pairs can be in any shard.
MOST_OPEN = 32
CONTRADICTED = "whose pairs say two things of one image"
UNRANKED = "whose images cannot be ranked"


def group(
    folder: str, *, out: str, images: int | None = None, samples_per_shard: int = 256, overwrite: bool = False
) -> None:
    """Write shards of groups from shards of pairs: the images of all pairs that share prompt, kind, order, categories,
    concept and user.

    An image that is in several pairs appears in the group once, with the labels from all of them. The images' bytes do
    not change. A prompt with one pair becomes a group of two. A group is left out and counted if its images cannot be
    ranked: by safety this needs labels, or else costs, of all images, by quality it needs scores. A stopped run
    continues when it is started again.

    Args:
        folder: A folder of shards, a tar file or a pattern of tar files.
        out: The folder to write the groups to.
        images: The largest number of images in a group, an even number. A prompt with more pairs becomes several
            groups; null: 64.
        samples_per_shard: How many groups a shard holds.
        overwrite: Delete what an earlier run wrote to `out`.

    Raises:
        UserError: the shards cannot be read or are cached, or no group can be made.
    """
    from pathlib import Path

    from lit_safety.core.progress import counter
    from lit_safety.data.format.manifest import FILE_NAME, JOURNAL, load_manifest
    from lit_safety.data.format.ranking import MAX_IMAGES
    from lit_safety.data.format.writer import ShardWriter
    from lit_safety.data.reading.source import open_source
    from lit_safety.users.table import copy_users

    most = MAX_IMAGES if images is None else images
    if most % 2 or not 2 <= most <= MAX_IMAGES:
        raise UserError(f"--images {images}: must be an even number from 2 to {MAX_IMAGES}")
    source, target = open_source(folder, "folder"), Path(out)
    if any(one.cache for one in source.caches):
        raise UserError(f"{folder}: holds cached latents; group the original shards, then make a cache of the groups")
    if Path(folder).resolve() == target.resolve():
        raise UserError(f"--out {out}: is the input folder; name another one")
    made_from = {"from": [list(one) for one in source.identity()], "images": most}
    provenance = source.manifest.provenance | {"grouped": made_from}
    if (target / FILE_NAME).exists() and not overwrite:
        if load_manifest(target).provenance != provenance:
            raise UserError(f"{target}: already holds other shards; name another folder or give --overwrite true")
        print(f"{target}: is already complete")
        return
    resumed = (target / JOURNAL).exists() and not overwrite
    pairs = most // 2
    plan = [places[start : start + pairs] for places in _planned(source) for start in range(0, len(places), pairs)]
    left_out: Counter[str] = Counter()
    shards = _Open(source)
    with ShardWriter(
        target, samples_per_shard, provenance=provenance, seeds=source.manifest.seeds, overwrite=overwrite, resume=True
    ) as writer:
        if resumed:
            print(f"{target}: continuing after {len(writer)} groups")
        with counter("group", len(plan)) as count:
            for places in plan:
                count()
                try:
                    key, about, data = _joined(shards, places)
                except _LeftOut as reason:
                    left_out[str(reason)] += 1
                    continue
                if key not in writer:
                    writer.write_group(key, about, data)
    shards.close()
    copy_users(source.given, target)
    manifest = writer.close()
    print(
        f"{target}: {manifest.nsamples} groups of {source.manifest.nsamples} pairs in {len(manifest.shardlist)} shards"
    )
    print(f"  images: {', '.join(f'{n} in {times}' for n, times in manifest.counts()['images'].items())} groups")
    for why, times in sorted(left_out.items()):
        print(f"  left out: {times} {why}")


class _LeftOut(Exception):
    """A group cannot be made; the message says why."""


class _Open:
    """Opens shards when they are needed; the least recently used one is closed first."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._open: OrderedDict[int, OpenShard] = OrderedDict()

    def get(self, number: int) -> OpenShard:
        if number not in self._open:
            self._open[number] = self.source.open_shard(number)
            if len(self._open) > MOST_OPEN:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(number)
        return self._open[number]

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()


def _planned(source: Source) -> Iterator[list[Place]]:
    """The positions of the pairs of each group, sorted by the group's first pair. Only metadata is read."""
    from contextlib import closing

    from lit_safety.data.format.sample import parse_metadata
    from lit_safety.data.format.tar_index import refuse_twice

    found: dict[tuple[Any, ...], list[Place]] = {}
    seen: dict[str, str] = {}
    for number in range(len(source.paths)):
        with closing(source.open_shard(number)) as shard:
            if shard.problem is not None:
                raise UserError(f"{shard.path}: {shard.problem}; restore the shard")
            for index, stored in enumerate(shard.index.samples):
                where = shard.where(index)
                about = parse_metadata(shard.read_member(index, "json"), where)
                refuse_twice(seen, stored.key, shard.path)
                source.check(number, index, about, where)
                if about.images:
                    raise UserError(f"{where}: is already a group; give shards of pairs")
                alike = about.prompt, about.prompt_kind, about.order, about.categories, about.concept, about.user_id
                found.setdefault(alike, []).append((number, index))
    yield from found.values()


def _joined(shards: _Open, places: list[Place]) -> tuple[str, PairMetadata, list[bytes]]:
    """Key, metadata and images of the group of the pairs at ``places``.

    Raises:
        _LeftOut: their images cannot be ranked.
        UserError: a pair cannot be read.
    """
    from dataclasses import replace

    from lit_safety.data.format.sample import ImageFacts, parse_metadata
    from lit_safety.data.reading.decode import image_bytes

    images: dict[bytes, ImageFacts] = {}
    first: tuple[str, PairMetadata] | None = None
    sources: set[str | None] = set()
    for number, index in places:
        shard = shards.get(number)
        key, members = shard.read(index)
        where = shard.where(index)
        about = parse_metadata(members["json"], where)
        first = first or (key, about)
        sources.add(about.source)
        for side, data in zip(about.names, image_bytes(members, about, where), strict=True):
            cost, score = (None if one is None else getattr(one, side) for one in (about.cost, about.score))
            facts = ImageFacts(getattr(about.harmful, side), cost, score, about.seed)
            images[data] = facts if data not in images else _both(images[data], facts)
    assert first is not None
    same = sources.pop() if len(sources) == 1 else None
    own = replace(first[1], images=tuple(images.values()), seed=None, noise_seeds=None, source=same)
    if len(images) < 2 or own.ranks is None or max(own.ranks) == 0:
        raise _LeftOut(UNRANKED)
    return first[0], own, list(images)


def _both(one: ImageFacts, other: ImageFacts) -> ImageFacts:
    """The labels of an image from two pairs. Seeds may differ, because a pair's seed can belong to its other image."""
    from lit_safety.data.format.sample import ImageFacts

    found: dict[str, Any] = {"seed": one.seed if one.seed == other.seed else None}
    for name in ("harmful", "cost", "score"):
        known = [value for value in (getattr(one, name), getattr(other, name)) if value is not None]
        if len(set(known)) > 1:
            raise _LeftOut(CONTRADICTED)
        found[name] = known[0] if known else None
    return ImageFacts(**found)
