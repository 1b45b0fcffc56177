"""Errors on a part of an image: a mask says where chosen and rejected differ."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def masked(mask: Tensor, *latents: Tensor) -> tuple[Tensor, ...]:
    """Predictions and targets (2B, ..., h, w), scaled so that their mean squared difference counts only the mask.

    The mean of (w / mean(w)) d^2 over all positions is sum(w d^2) / sum(w), so both are multiplied by sqrt(w /
    mean(w)).

    Args:
        mask: (B, H, W) in [0, 1], in pixels; a latent's weight w is the mean over its pixels.
        latents: tensors of 2B rows: chosen, then rejected.
    """
    first = latents[0]
    weights = F.adaptive_avg_pool2d(mask[:, None].float(), (first.shape[-2], first.shape[-1]))
    scale = (weights / weights.mean((2, 3), keepdim=True)).sqrt().repeat(2, 1, 1, 1)
    scale = scale.view(len(first), *[1] * (first.ndim - 3), *scale.shape[2:])
    return tuple(one.float() * scale for one in latents)
