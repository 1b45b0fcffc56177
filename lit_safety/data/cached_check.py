"""What `shards validate` asks of a cached set."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from lit_safety.data.cache import PROMPTS, Cache, parse_cache
from lit_safety.data.cached import cached_tensors
from lit_safety.data.cached_source import check_prompts
from lit_safety.data.manifest import FILE_NAME, file_sha256
from lit_safety.data.prompt_table import PromptTable
from lit_safety.data.reference_cache import read_reference
from lit_safety.errors import UserError


class CachedCheck:
    """Checks the cache of prompts once and the latents of each sample.

    Args:
        folder: the shards.
        stated: `cache` of their manifest.
        hashes: compare the SHA-256 of the cache of prompts too.

    Raises:
        UserError: what the manifest says of the cache cannot be read.
    """

    def __init__(self, folder: str, stated: dict[str, Any], hashes: bool) -> None:
        self.cache: Cache = parse_cache(stated, f"{folder}/{FILE_NAME}: cache")
        self.path = os.path.join(folder, PROMPTS)
        self._hashes = hashes
        self._table: PromptTable | None = None

    @property
    def images(self) -> bool:
        """Whether images must be there too."""
        return self.cache.images

    def problems(self) -> Iterator[str]:
        """What is wrong with the cache of prompts as a whole."""
        try:
            self._table = PromptTable(self.path)
            check_prompts(self._table, self.cache)
        except UserError as error:
            yield str(error)
            return
        sha256 = self.cache.prompts.get("sha256")
        if self._hashes and sha256 is not None and file_sha256(self.path) != sha256:
            yield f"{self.path}: is not the file the manifest was made with (its SHA-256 differs)"

    def sample(self, members: dict[str, bytes], prompt: str, where: str) -> None:
        """Check one sample.

        Raises:
            UserError: naming what is missing or wrong.
        """
        for mirror in (False, True) if self.cache.flip else (False,):
            cached_tensors(members, self.cache, mirror, where)
            if (reference := self.cache.reference) is not None:
                latent = self.cache.latent if reference.predictions else None
                for number in range(reference.draws):
                    read_reference(members, reference, latent, mirror, number, where)
        if self._table is not None and self._table.get(prompt) is None:
            raise UserError(f"{where}: its prompt {prompt!r} is missing in {self.path}")
