"""DARE: drop entries of the updates by chance and rescale the rest, then add (Yu et al., arXiv 2311.03099, eq. 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_safety.data.chance import generator, sample_seed


def dare(delta: Tensor, drop: float, generator: torch.Generator) -> Tensor:
    """One update (out, in) with every entry 0 with probability ``drop``, else divided by 1 - drop: the same on average.

    Args:
        delta: (out, in).
        drop: in [0, 1).
        generator: of the CPU; the same one gives the same entries.
    """
    kept = torch.rand(delta.shape, generator=generator) >= drop
    return delta * kept.to(delta) / (1 - drop)


def dare_sum(
    deltas: Sequence[Tensor], weights: Sequence[float], drop: float, seed: int, names: Sequence[str], layer: str
) -> Tensor:
    """sum_k w_k dare(delta_k): (out, in). What is dropped depends on seed, expert and layer, not on places in lists."""
    total = torch.zeros_like(deltas[0])
    for delta, weight, name in zip(deltas, weights, names, strict=True):
        chance = generator(sample_seed(seed, 0, name), f"dare {layer}")
        total += weight * dare(delta, drop, chance)
    return total
