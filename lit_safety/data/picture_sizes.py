"""How large the pictures of a source are, told from the first bytes of each."""

from __future__ import annotations

import functools
import io
import os
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray

from lit_safety.data.images import FORMATS, shown_size
from lit_safety.data.remote import is_remote
from lit_safety.data.source import Source
from lit_safety.data.tarindex import OpenShard
from lit_safety.errors import UserError

#: Bytes that are read at once.
BUFFER = 1 << 12
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


class _Part(io.RawIOBase):
    """A member of an open tar as a file of its own."""

    def __init__(self, file: io.BufferedReader, offset: int, size: int) -> None:
        self._file, self._offset, self._size, self._place = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        self._place = max(0, start + offset)
        return self._place

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._offset + self._place)
        data = self._file.read(min(len(buffer), max(0, self._size - self._place)))
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)


def _size(file: io.BufferedReader, members: dict[str, tuple[int, int]]) -> tuple[int, int]:
    for suffix in FORMATS:
        if f"chosen.{suffix}" not in members:
            continue
        offset, size = members[f"chosen.{suffix}"]
        try:
            width, height = shown_size(io.BufferedReader(_Part(file, offset, size), BUFFER))
            return height, width
        except UserError:
            return 0, 0  # named, counted and judged by on_bad_sample when the sample is read
    return 0, 0
