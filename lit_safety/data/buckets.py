"""Aspect buckets: pictures keep (nearly) their own shape, and every batch is of one.

As SDXL was trained (arXiv 2307.01952, appendix I): sides are multiples of 64 pixels, about as many pixels as the square
of the resolution, up to 4 : 1. Which bucket a pair goes to is decided by its chosen picture; the rejected one is cut to
the same size. A bucket that has not pairs enough for one step goes into its neighbour, so that no pair is left out for
good. Everything follows from the pictures' sizes and the pairs a step takes: ranks agree without a word.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lit_safety.data.plan import Group
from lit_safety.data.select import Selection

#: The longest side, in shortest sides.
LIMIT = 4.0
Size = tuple[int, int]
"""Height and width in pixels."""


def bucket_sizes(resolution: int) -> list[Size]:
    """All sizes for a resolution, from the widest to the tallest.

    >>> bucket_sizes(1024)[15:18]
    [(960, 1088), (1024, 1024), (1088, 960)]
    """
    # Small models, as in tests and in the toy world, take small steps.
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
    """For each picture, int64 (n, 2) of height and width, the bucket whose shape is most like its own: int64 (n,).

    A picture of unknown size (0, 0) counts as square: its bytes are bad, and whoever reads it says so.
    """
    own = np.log(np.maximum(sizes[:, 0], 1)) - np.log(np.maximum(sizes[:, 1], 1))
    shapes = np.array([math.log(height / width) for height, width in buckets])
    return np.abs(own[:, None] - shapes[None]).argmin(axis=1).astype(np.int64)


def merged(counts: Sequence[int], buckets: Sequence[Size], least: int) -> list[int]:
    """Where each bucket's pairs go: into itself, or, while it has less than ``least``, into its neighbour.

    The smallest is moved first, to the next shape on the side that is more like it; of two that are equally like it,
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
    """The pairs that take part, one group a bucket, from the widest pictures to the tallest.

    Args:
        selection: which pairs.
        sizes: of every shard's chosen pictures, int64 (n, 2): height and width.
        resolution: of the square bucket.
        least: pairs that one step takes.
    """
    buckets = bucket_sizes(resolution)
    numbers = selection.numbers or tuple(np.arange(len(one)) for one in sizes)
    # A part of the shards (`Selection.part`) keeps its numbers and has a count of 0 elsewhere.
    numbers = tuple(one if count else one[:0] for one, count in zip(numbers, selection.counts, strict=True))
    found = [nearest(size[own], buckets) for size, own in zip(sizes, numbers, strict=True)]
    counts = np.bincount(np.concatenate(found), minlength=len(buckets))
    target = np.array(merged(counts.tolist(), buckets, least))
    groups = []
    for bucket in sorted(set(target[counts > 0].tolist())):
        own = tuple(number[target[one] == bucket] for number, one in zip(numbers, found, strict=True))
        groups.append(Group(Selection(tuple(len(one) for one in own), own), size=buckets[bucket]))
    return groups
