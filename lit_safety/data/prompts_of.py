"""The different prompts of a source, in the order in which they stand."""

from __future__ import annotations

from lit_safety.data.sample import parse_metadata
from lit_safety.data.source import Source


def prompts_of(source: Source) -> list[str]:
    """Read every sample's JSON member and nothing else.

    Raises:
        UserError: one cannot be read; names the sample.
    """
    found: dict[str, None] = {}
    for number in range(len(source.paths)):
        shard = source.open_shard(number)
        try:
            for sample in range(source.manifest.shardlist[number].nsamples):
                metadata = parse_metadata(shard.read_member(sample, "json"), shard.where(sample))
                found[metadata.prompt] = None
        finally:
            shard.close()
    return list(found)
