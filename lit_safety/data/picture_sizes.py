"""How large the pictures of a source are, told from the first bytes of each."""

from __future__ import annotations

import functools
import io
import os
import warnings

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray
from PIL import Image

from lit_safety.data.images import FORMATS
from lit_safety.data.remote import is_remote
from lit_safety.data.source import Source
from lit_safety.data.tarindex import OpenShard
from lit_safety.errors import UserError

#: Bytes in which a PNG or a JPEG has said how large it is, its metadata before it included.
HEADER = 1 << 18
#: From so many pairs on the log says what is being waited for.
MANY = 20_000


def chosen_sizes(source: Source, key: str) -> list[NDArray[np.int64]]:
    """Height and width of each shard's chosen pictures, int64 (n, 2); (0, 0) where they cannot be told.

    Args:
        source: the shards.
        key: the setting that asks, for messages.

    Raises:
        UserError: a shard does not lie on this machine.
    """
    for path in source.paths:
        if is_remote(path):
            raise UserError(
                f"{source.key}: {key} must know the sizes of all pictures first, and {path} is not on this machine; "
                "copy the shards here"
            )
    if source.manifest.nsamples > MANY:
        rank_zero_info(f"{source.key}: reading the sizes of {source.manifest.nsamples} pictures")
    found = []
    for path, listed in zip(source.paths, source.manifest.shardlist, strict=True):
        stat = os.stat(path)
        sizes = np.zeros((listed.nsamples, 2), dtype=np.int64)
        own = _sizes_in(os.path.abspath(path), stat.st_size, stat.st_mtime_ns)[: listed.nsamples]
        sizes[: len(own)] = np.array(own, dtype=np.int64).reshape(-1, 2)
        found.append(sizes)
    return found


@functools.cache
def _sizes_in(path: str, size: int, mtime: int) -> tuple[tuple[int, int], ...]:
    shard = OpenShard(path)
    try:
        with open(path, "rb") as file:
            return tuple(_size(file, sample.members) for sample in shard.index.samples)
    finally:
        shard.close()


def _size(file: io.BufferedReader, members: dict[str, tuple[int, int]]) -> tuple[int, int]:
    for suffix, kind in FORMATS.items():
        if f"chosen.{suffix}" not in members:
            continue
        offset, size = members[f"chosen.{suffix}"]
        file.seek(offset)
        data = file.read(size if kind == "WEBP" else min(size, HEADER))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                with Image.open(io.BytesIO(data), formats=[kind]) as image:
                    return image.height, image.width
        except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError):
            return 0, 0  # named, counted and judged by on_bad_sample when the sample is read
    return 0, 0
