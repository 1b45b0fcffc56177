"""The cache of one YAML key: of a folder, or of several folders that the same model made."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from lit_safety.core.errors import UserError
from lit_safety.core.hashes import file_sha256
from lit_safety.data.cache.cache import PROMPTS, Cache, cached_tensors, made_by, parse_cache
from lit_safety.data.cache.prompt_table import PromptTable, PromptTables
from lit_safety.data.cache.reference import read_reference
from lit_safety.data.format.manifest import FILE_NAME
from lit_safety.data.format.sample import PairMetadata
from lit_safety.data.reading.source import Source, is_remote


@dataclass(frozen=True)
class CachedSource:
    """The cached latents and text that replace images and encoders."""

    key: str
    """The YAML key of the shards, for messages."""
    cache: Cache
    prompts: PromptTables | None
    """None: the cache holds latents alone."""


def cached_source(source: Source, reference: bool = True) -> CachedSource | None:
    """The cache of a source; None if its shards hold images.

    Args:
        source: the shards.
        reference: also read what is cached of the reference.

    Raises:
        UserError: only some of its folders are cached, two caches were made by different models or at different
            resolutions, or a cache of prompts is missing or damaged.
    """
    found = [(one, parse_cache(one.cache, f"{one.given}/{FILE_NAME}: cache")) for one in source.caches if one.cache]
    if not found:
        return None
    if len(found) < len(source.caches):
        without = next(one.given for one in source.caches if not one.cache)
        raise UserError(
            f"{source.key}: {found[0][0].given} is cached and {without} is not; cache both with `shards precompute`, "
            "or set data.init_args.use_cache to false if the images are there"
        )
    (first, cache), *others = found
    for other, its in others:
        if its.text != cache.text:
            whole, bare = (first, other) if cache.text else (other, first)
            raise UserError(
                f"{source.key}: the cache {whole.given} holds text and {bare.given} holds latents alone; make "
                "one of them again, with the same `shards precompute --text`"
            )
        if (its.weights, its.size, its.latent) != (cache.weights, cache.size, cache.latent):
            raise UserError(
                f"{source.key}: the cache {first.given} was made by {cache}, the cache {other.given} by {its}; "
                "make one of them again"
            )
        if reference and its.reference != cache.reference:
            raise UserError(
                f"{source.key}: the reference caches of {first.given} and {other.given} differ (draws, denoiser, "
                "precision, or only one has one); make one of them again, or set data.init_args.use_reference to false"
            )
    for one, its in found:
        if its.text and not is_remote(one.prompts):  # report its errors before a model is loaded
            check_prompts(PromptTable(one.prompts), its)
    together = replace(
        cache,
        flip=all(one.flip for _, one in found),
        images=all(one.images for _, one in found),
        truncated=sum(one.truncated for _, one in found),
        first_truncated=next((one.first_truncated for _, one in found if one.first_truncated), None),
        reference=cache.reference if reference else None,
    )
    tables = {one.prompts: _sha256(its) for one, its in found}
    return CachedSource(source.key, together, PromptTables(tables) if cache.text else None)


def check_prompts(table: PromptTable, cache: Cache) -> None:
    """Check that a cache of prompts is the one its manifest was written with, without reading all of it.

    Raises:
        UserError: it does not have the empty prompt, or other encoders made it.
    """
    table.empty()
    stated = table.metadata.get("weights")
    size = cache.prompts.get("bytes")
    if (stated is not None and stated != made_by(cache.weights)) or size not in (None, os.path.getsize(table.path)):
        raise UserError(
            f"{table.path}: is not the file the manifest was made with (another model or size); restore it or make the "
            "cache again with `shards precompute`"
        )


def _sha256(cache: Cache) -> str | None:
    stated = cache.prompts.get("sha256")
    return stated if isinstance(stated, str) else None


# What `shards validate` checks in a cached set.


class CachedCheck:
    """Checks the cache of prompts once and the latents of each sample.

    Args:
        folder: the shards.
        stated: `cache` of their manifest.
        hashes: also compare the SHA-256 of the cache of prompts.

    Raises:
        UserError: what the manifest states about the cache cannot be read.
    """

    def __init__(self, folder: str, stated: dict[str, Any], hashes: bool) -> None:
        self.cache: Cache = parse_cache(stated, f"{folder}/{FILE_NAME}: cache")
        self.path = os.path.join(folder, PROMPTS)
        self._hashes = hashes
        self._table: PromptTable | None = None

    @property
    def images(self) -> bool:
        """Whether samples must also hold images."""
        return self.cache.images

    def problems(self) -> Iterator[str]:
        """The problems of the cache of prompts as a whole."""
        if not self.cache.text:
            return
        try:
            self._table = PromptTable(self.path)
            check_prompts(self._table, self.cache)
        except UserError as error:
            yield str(error)
            return
        sha256 = self.cache.prompts.get("sha256")
        if self._hashes and sha256 is not None and file_sha256(self.path) != sha256:
            yield f"{self.path}: is not the file the manifest was made with (its SHA-256 differs)"

    def sample(self, members: dict[str, bytes], about: PairMetadata, where: str) -> None:
        """Check one sample.

        Raises:
            UserError: names what is missing or wrong.
        """
        names, prompt = about.names, about.prompt
        for mirror in (False, True) if self.cache.flip else (False,):
            cached_tensors(members, self.cache, mirror, where, names, range(len(names)))
            if (reference := self.cache.reference) is not None:
                latent = self.cache.latent if reference.predictions else None
                for number in range(reference.draws):
                    read_reference(members, reference, latent, mirror, number, where, len(names))
        if self._table is not None and self._table.get(prompt) is None:
            raise UserError(f"{where}: its prompt {prompt!r} is missing in {self.path}")
