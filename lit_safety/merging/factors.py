"""Arithmetic on products b @ a without making the product: stacking, exact reduction, truncation. All in fp64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_safety.adapters.lora_file import LowRank


def stack(parts: Sequence[LowRank], weights: Sequence[float | Tensor]) -> LowRank:
    """sum_k weights[k] * delta_k as one product of rank sum_k r_k, scales and weights folded into b.

    Args:
        parts: updates of one layer, (out, in).
        weights: a number a part, or a column (out, 1) that weighs the rows of its delta.

    A part of weight 0 or rank 0 takes no rank. If a single part is left and its weight is a number, its tensors are
    returned as they are, so that at weight 1 nothing is rounded.
    """
    kept = [(p, w) for p, w in zip(parts, weights, strict=True) if p.rank and bool(torch.as_tensor(w).count_nonzero())]
    if len(kept) == 1 and not isinstance(kept[0][1], Tensor):
        part, weight = kept[0]
        return LowRank(part.a, part.b, part.scale * float(weight), part.kernel)
    out, inputs = parts[0].shape
    a = torch.cat([part.a.double() for part, _ in kept] or [torch.zeros(0, inputs, dtype=torch.float64)])
    blocks = [part.b.double() * (part.scale * weight) for part, weight in kept]
    b = torch.cat(blocks or [torch.zeros(out, 0, dtype=torch.float64)], dim=1)
    return LowRank(a, b, kernel=parts[0].kernel)


def reduce_rank(layer: LowRank) -> LowRank:
    """The same update with a rank of at most min(out, in): exact up to rounding, by QR of the longer factor."""
    out, inputs = layer.shape
    if layer.rank <= min(out, inputs):
        return layer
    a, b = layer.a.double(), layer.b.double() * layer.scale
    if out < inputs:
        q, rest = torch.linalg.qr(b)  # (out, out), (out, r)
        return LowRank(rest @ a, q, kernel=layer.kernel)
    q, rest = torch.linalg.qr(a.T)  # (in, in), (in, r)
    return LowRank(q.T, b @ rest.T, kernel=layer.kernel)
