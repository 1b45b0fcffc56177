"""The image encoder that the families of Stable Diffusion share: a KL autoencoder (`AutoencoderKL`)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor


def encode_posterior(vae: Any, images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] -> mean and standard deviation, unscaled, float32 (B, 2, C, h, w).

    It is contiguous, like tensors from a cache: in another memory format later sums would round differently.
    Under float16 autocast it still runs in fp32: SDXL's encoder overflows in float16.
    """
    device = images.device.type
    half = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is torch.float16
    with torch.autocast(device, enabled=False) if half else nullcontext():
        found = vae.encode(images.to(vae.dtype)).latent_dist
    return torch.stack([found.mean.float(), found.std.float()], dim=1).contiguous()


# Text encoded by CLIP as SDXL and SD3 use it: the layer before the last, and the pooled projection.


def penultimate(
    tokenizer: Any, encoder: Any, prompts: Sequence[str], length: int | None = None
) -> tuple[Tensor, Tensor]:
    """B prompts -> hidden states (B, tokens, width) of the layer before the last, and the encoder's first output.

    The first output is the pooled projection (B, P) of a `CLIPTextModelWithProjection`, else the last hidden states.

    Args:
        tokenizer: the encoder's tokenizer.
        encoder: a CLIP text model.
        prompts: texts; too long ones are cut, but the end token is kept.
        length: number of tokens; None: as the tokenizer says.
    """
    tokens = tokenizer(
        list(prompts),
        padding="max_length",
        max_length=length or tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    found = encoder(tokens.input_ids.to(encoder.device, non_blocking=True), output_hidden_states=True)
    return found.hidden_states[-2], found[0]
