"""TIES: trim, elect a sign, average those that agree (Yadav et al., arXiv 2306.01708, algorithm 1)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def ties(deltas: Tensor, density: float, weights: Tensor | None = None) -> Tensor:
    """Merge one layer's updates, entry by entry.

    1. trim: of every update keep the ``density`` share of entries with the largest magnitudes (equal ones at the limit
       are all kept, so that no order decides), the rest becomes 0;
    2. elect: the sign of an entry is the sign of the sum over the updates;
    3. merge: the mean over the updates whose entry has that sign; where the sum is 0 the entry is 0.

    The paper trims the updates as a whole; here every layer is trimmed for itself, as the common libraries do, so that
    one layer is held at a time.

    Args:
        deltas: (K, out, in).
        density: share of entries kept, in (0, 1].
        weights: (K,), multiply the updates first; None: all 1.

    Returns:
        (out, in), in general of full rank.
    """
    if weights is not None:
        deltas = deltas * weights.to(deltas)[:, None, None]
    trimmed = torch.stack([_trim(delta, density) for delta in deltas])
    sign = trimmed.sum(dim=0).sign()
    total, count = torch.zeros_like(sign), torch.zeros_like(sign)
    for update in trimmed:
        agrees = update * sign > 0
        total += update * agrees
        count += agrees
    return total / count.clamp(min=1)


def _trim(delta: Tensor, density: float) -> Tensor:
    magnitudes = delta.abs()
    dropped = delta.numel() - max(1, round(density * delta.numel()))
    if dropped == 0:
        return delta
    # NumPy's selection takes a tenth of the time of torch's.
    limit = float(np.partition(magnitudes.flatten().cpu().numpy(), dropped)[dropped])
    return delta * (magnitudes >= limit)
