"""The pairs of shards in the stored order, checked and not decoded, for commands that write shards again."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from lit_safety.core.errors import UserError
from lit_safety.data.format.sample import parse_metadata
from lit_safety.data.format.tar_index import refuse_twice
from lit_safety.data.reading.decode import MASK, image_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lit_safety.data.format.sample import PairMetadata
    from lit_safety.data.reading.source import Source


class Stored(NamedTuple):
    """A pair or group as it is stored."""

    key: str
    where: str
    """Shard and key, for messages."""
    metadata: PairMetadata
    images: list[bytes]
    """The bytes of its images, in the order of `metadata.names`."""
    mask: dict[str, bytes]
    """Its mask by the name of the member; empty: it has none."""


def stored_pairs(source: Source) -> Iterator[Stored]:
    """Every pair in the stored order.

    Raises:
        UserError: a shard is damaged, a key occurs twice, or a pair is not what the manifest says; names it.
    """
    seen: dict[str, str] = {}
    for number in range(len(source.paths)):
        shard = source.open_shard(number)
        try:
            if shard.problem is not None:
                raise UserError(f"{shard.path}: {shard.problem}; restore the shard")
            for index in range(len(shard.index.samples)):
                key, members = shard.read(index)
                where = shard.where(index)
                refuse_twice(seen, key, shard.path)
                if "json" not in members:
                    raise UserError(f"{where}: lacks its json")
                metadata = parse_metadata(members["json"], where)
                images = image_bytes(members, metadata, where)
                source.check(number, index, metadata, where)
                yield Stored(key, where, metadata, images, {MASK: members[MASK]} if MASK in members else {})
        finally:
            shard.close()
