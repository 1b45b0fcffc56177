"""Every random choice for a sample, as a pure function of (seed, epoch, key, purpose).

A choice does not depend on the sample's batch, rank or worker. So batch 8, batch 4 accumulated
twice and two ranks of 4 make the same choices, and a resumed run makes the choices of the run that it continues.
Chosen and rejected share a sample's seed and so share every choice. A purpose is a word such as `"timestep"`;
two purposes never share their numbers.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

#: A step needs thousands of numbers for these purposes. Workers draw them early where they know how many.
NOISE, LATENT = "noise", "latent"
TIMESTEP = "timestep"

_63_BITS = (1 << 63) - 1
_53_BITS = (1 << 53) - 1


def _hash(*parts: str | int) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = str(part).encode("utf-8", "surrogatepass")
        # With the lengths, ("a", "bc") and ("ab", "c") give different bytes.
        digest.update(len(data).to_bytes(8, "little") + data)
    return int.from_bytes(digest.digest(), "little") & _63_BITS


def sample_seed(seed: int, epoch: int, key: str) -> int:
    """The 63-bit seed of the sample `key` in one pass over the data."""
    return _hash("sample", seed, epoch, key)


def derive(sample_seed: int, purpose: str) -> int:
    """The 63-bit seed for one purpose of one sample."""
    return _hash("purpose", sample_seed, purpose)


def fixed_seed(key: str, number: int, count: int) -> int:
    """The seed of the `number`-th of a sample's `count` fixed draws of timestep and noise, exact in float64.

    Its timestep lies in the `number`-th of `count` equal parts of the schedule, so that together they cover it.
    """
    return next(
        seed
        for attempt in itertools.count()
        if int(uniform(seed := _hash("fixed", key, number, count, attempt) & _53_BITS, TIMESTEP) * count) == number
    )


def turn(seed: int, epoch: int, key: str, count: int) -> int:
    """Which of its `count` fixed draws the sample `key` uses in a pass. In `count` passes it uses each of them once."""
    return (_hash("turn", seed, key) + epoch) % count


def generator(sample_seed: int, purpose: str) -> torch.Generator:
    """A CPU generator for one purpose of one sample: the same numbers on every device and rank."""
    return torch.Generator().manual_seed(derive(sample_seed, purpose))


def uniform(sample_seed: int, purpose: str, low: float = 0.0, high: float = 1.0) -> float:
    """One number in [low, high)."""
    return low + (high - low) * (derive(sample_seed, purpose) >> 10) / (1 << 53)


def integers(seeds: Sequence[int], purpose: str, high: int, low: int = 0) -> Tensor:
    """One whole number in [low, high) a sample: int64 (B,)."""
    # The modulo's bias is below high / 2^63, which does not matter.
    return torch.tensor([low + derive(seed, purpose) % (high - low) for seed in seeds], dtype=torch.int64)


def normal(seeds: Sequence[int], purpose: str, shape: Sequence[int]) -> Tensor:
    """Standard normal numbers, each sample's its own: float32 (B, *shape) on the CPU."""
    return torch.stack([torch.randn(*shape, generator=generator(seed, purpose)) for seed in seeds])
