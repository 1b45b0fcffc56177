"""Frozen weights in the precision that autocast computes in: half the memory, the same numbers, no cast at each use."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from accelerate.utils.operations import convert_to_fp32
from torch import nn

#: Layers whose weights autocast casts at every use. Normalisations it computes in fp32, on some devices, and they are
#: small: theirs stay as they are.
CAST_BY_AUTOCAST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def lower_frozen(denoiser: nn.Module, dtype: torch.dtype) -> None:
    """Keep the frozen weights of linear layers and convolutions in ``dtype``, and always run the network in autocast.

    What is trained stays in fp32. Every number is the one that autocast gives with weights in fp32, whose cast it
    would do at each use (it keeps casts only of what is trained). Whoever draws, probes or merges outside of a
    training step gets autocast too: weights in ``dtype`` cannot meet inputs in fp32.

    Args:
        denoiser: with all adapters attached.
        dtype: of autocast, such as bfloat16.
    """
    for layer in denoiser.modules():
        if isinstance(layer, CAST_BY_AUTOCAST):
            for weight in layer.parameters(recurse=False):
                if not weight.requires_grad:
                    weight.data = weight.data.to(dtype)
    network: Any = denoiser
    network.lowered_to = dtype
    network.forward = MethodType(_in_autocast, denoiser)


def _in_autocast(denoiser: Any, *args: Any, **kwargs: Any) -> Any:
    """`forward` of a lowered network; a bound method, so that a deep copy of it computes with weights of its own."""
    # Casts are not kept: one made without gradient would be found by a pass with gradient.
    with torch.autocast(next(denoiser.parameters()).device.type, denoiser.lowered_to, cache_enabled=False):
        found = type(denoiser).forward(denoiser, *args, **kwargs)
    return convert_to_fp32(found)  # as samplers and decoders outside of autocast expect it
