"""The image encoder that the families of Stable Diffusion share: a KL autoencoder (`AutoencoderKL`)."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor


def encode_posterior(vae: Any, images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] -> mean and standard deviation, unscaled, float32 (B, 2, C, h, w).

    It is contiguous, as what is read from a cache is: in another memory format later sums would round otherwise.
    Under float16 autocast it still runs in fp32: SDXL's encoder overflows in float16.
    """
    device = images.device.type
    half = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is torch.float16
    with torch.autocast(device, enabled=False) if half else nullcontext():
        found = vae.encode(images.to(vae.dtype)).latent_dist
    return torch.stack([found.mean.float(), found.std.float()], dim=1)
