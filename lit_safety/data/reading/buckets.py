"""Aspect buckets: images keep (nearly) their own shape, and every batch has one shape.

As SDXL was trained (arXiv 2307.01952, appendix I): sides are multiples of 64 pixels, the number of pixels is about that
of the square, and shapes go up to 4 : 1. The chosen image decides a pair's bucket (the first image a group's); the
rejected one is cut to the same size. A bucket with too few pairs for one step joins its neighbour, so that every pair
is used at some time. All of this depends only on the images' sizes and the pairs of a step, so all ranks agree.
"""

from __future__ import annotations

import functools
import io
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray

from lit_safety.core.errors import UserError
from lit_safety.core.images import FORMATS, shown_size
from lit_safety.data.format.tar_index import OpenShard
from lit_safety.data.reading.order import Group
from lit_safety.data.reading.select import Selection
from lit_safety.data.reading.source import Source, is_remote

#: The largest ratio of the longer to the shorter side.
LIMIT = 4.0
Size = tuple[int, int]
"""Height and width in pixels."""


def bucket_sizes(resolution: int) -> list[Size]:
    """All sizes for a resolution, from the widest to the tallest.

    >>> bucket_sizes(1024)[15:18]
    [(960, 1088), (1024, 1024), (1088, 960)]
    """
    # Small models, as in tests and in the toy world, use small steps.
    step = 64 if resolution >= 512 else max(8, resolution // 8 // 8 * 8)
    found = set()
    for short in range(step, resolution + 1, step):
        long = int(resolution * resolution / short) // step * step
        if short <= long <= LIMIT * short:
            found |= {(short, long), (long, short)}
    for long in range(resolution // step * step, int(resolution * LIMIT) + 1, step):
        short = int(resolution * resolution / long) // step * step
        if 0 < short <= long <= LIMIT * short:
            found |= {(short, long), (long, short)}
    return sorted(found, key=lambda size: (size[0] / size[1], size[0]))


def nearest(sizes: NDArray[np.int64], buckets: Sequence[Size]) -> NDArray[np.int64]:
    """For each image (int64 (n, 2) of height and width) the bucket whose shape is most like its own: int64 (n,).

    An image of unknown size (0, 0) counts as square: it is damaged, which is reported when it is read.
    """
    own = np.log(np.maximum(sizes[:, 0], 1)) - np.log(np.maximum(sizes[:, 1], 1))
    shapes = np.array([math.log(height / width) for height, width in buckets])
    return np.abs(own[:, None] - shapes[None]).argmin(axis=1).astype(np.int64)


def merged(counts: Sequence[int], buckets: Sequence[Size], least: int) -> list[int]:
    """The bucket that each bucket's pairs go to: itself, or its neighbour while it has fewer than ``least``.

    The smallest bucket is moved first, to the neighbour whose shape is more like its own; if both are equally like it,
    to the one nearer to the square. Buckets are in the order of their shapes.
    """
    target = list(range(len(buckets)))
    left = {number: count for number, count in enumerate(counts) if count}
    shapes = [math.log(height / width) for height, width in buckets]
    while len(left) > 1 and min(left.values()) < least:
        small = min(left, key=lambda number: (left[number], number))
        others = [number for number in left if number != small]
        into = min(others, key=lambda number: (abs(shapes[number] - shapes[small]), abs(shapes[number]), number))
        left[into] += left.pop(small)
        target = [into if number == small else number for number in target]
    return target


def bucket_groups(selection: Selection, sizes: Sequence[NDArray[np.int64]], resolution: int, least: int) -> list[Group]:
    """The used pairs, one group a bucket, from the widest images to the tallest.

    Args:
        selection: which pairs.
        sizes: of every shard's chosen images, int64 (n, 2): height and width.
        resolution: of the square bucket.
        least: pairs of one step.
    """
    buckets = bucket_sizes(resolution)
    numbers = selection.numbers or tuple(np.arange(len(one)) for one in sizes)
    # In a part of the shards (`Selection.part`) shards keep their numbers, and the others have a count of 0.
    numbers = tuple(one if count else one[:0] for one, count in zip(numbers, selection.counts, strict=True))
    found = [nearest(size[own], buckets) for size, own in zip(sizes, numbers, strict=True)]
    counts = np.bincount(np.concatenate(found), minlength=len(buckets))
    target = np.array(merged(counts.tolist(), buckets, least))
    groups = []
    for bucket in sorted(set(target[counts > 0].tolist())):
        own = tuple(number[target[one] == bucket] for number, one in zip(numbers, found, strict=True))
        groups.append(Group(Selection(tuple(len(one) for one in own), own), size=buckets[bucket]))
    return groups


# The sizes of a source's images, from the first bytes of each.


#: Bytes that are read at once.
BUFFER = 1 << 12
#: From so many pairs on, the log says that sizes are being read.
MANY = 20_000


def chosen_sizes(source: Source, key: str) -> list[NDArray[np.int64]]:
    """Height and width of each shard's chosen images, int64 (n, 2); (0, 0) if they cannot be read.

    Args:
        source: the shards.
        key: the setting that asks, for messages.

    Raises:
        UserError: a shard is not on this machine.
    """
    for path in source.paths:
        if is_remote(path):
            raise UserError(
                f"{source.key}: {key} must know the sizes of all images first, and {path} is not on this machine; "
                "copy the shards here"
            )
    if source.manifest.nsamples > MANY:
        rank_zero_info(f"{source.key}: reading the sizes of {source.manifest.nsamples} images")
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
    """A member of an open tar, as a file."""

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
    for name in (f"{side}.{suffix}" for side in ("chosen", "0") for suffix in FORMATS):
        if name not in members:
            continue
        offset, size = members[name]
        try:
            width, height = shown_size(io.BufferedReader(_Part(file, offset, size), BUFFER))
            return height, width
        except UserError:
            return 0, 0  # `on_bad_sample` decides about it when the sample is read
    return 0, 0
