"""Batches made by hand."""

from __future__ import annotations

import math

import torch

from lit_safety.data.reading.batch import PairBatch


def batch_of(rows: list[int], costs: tuple[float, float] = (-1.0, 1.0), order: str = "safety") -> PairBatch:
    """Pairs whose images and seeds depend on their number alone."""
    generators = [torch.Generator().manual_seed(100 + row) for row in rows]
    chosen = torch.stack([torch.rand(3, 32, 32, generator=g) * 2 - 1 for g in generators])
    rejected = torch.stack([torch.rand(3, 32, 32, generator=g) * 2 - 1 for g in generators])
    size = len(rows)
    return PairBatch(
        keys=[f"{row:04d}" for row in rows],
        seeds=[1000 + row for row in rows],
        prompts=["a red cat" if row % 2 else "a gun and a house" for row in rows],
        prompt_kinds=["clean" if row % 2 else "harmful" for row in rows],
        categories=[() if row % 2 else ("violence",) for row in rows],
        orders=[order] * size,
        chosen=chosen,
        rejected=rejected,
        clean=torch.tensor([float(row % 2) for row in rows]),
        harmful=torch.tensor([[0.0, 1.0]] * size),
        cost=torch.tensor([costs] * size),
        has_cost=[not any(math.isnan(cost) for cost in costs)] * size,
        score=torch.tensor([[0.8, 0.2]] * size),
        has_score=[True] * size,
        has_harmful=[True] * size,
        user_ids=[None] * size,
    )
