"""Frozen weights with fewer bits than float32, together with a LoRA: half precision, or 8 or 4 bits.

Only runs with such settings import this file, and only the package of the chosen kind is needed.
"""

from __future__ import annotations

from importlib.util import find_spec
from types import MethodType
from typing import Any

import torch
from accelerate.utils.operations import convert_to_fp32
from torch import Tensor, nn

from lit_safety.core.errors import UserError

KEY = "model.init_args.backbone.init_args.denoiser_quantization"


# 8 or 4 bits: diffusers' configuration, and how to recognise such a weight.


def configuration(kind: str, dtype: torch.dtype) -> Any:
    """diffusers' configuration for a kind of `settings.Quantization`; layers compute in ``dtype``.

    Raises:
        UserError: the package is not installed, or it needs a GPU and there is none.
    """
    package, bits = kind.removesuffix("bit").rsplit("_", 1)
    if find_spec(package) is None:
        raise UserError(f"`{KEY}: {kind}`: needs the package {package}: pip install {package}")
    if package == "torchao":
        from diffusers import TorchAoConfig
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    if not torch.cuda.is_available():
        raise UserError(f"`{KEY}: {kind}`: bitsandbytes needs a GPU, but there is none here: use torchao_8bit")
    from diffusers import BitsAndBytesConfig

    if bits == "8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def is_quantized(weight: Tensor) -> bool:
    """Whether a weight is stored in fewer bits: as bytes (bitsandbytes), or as a tensor of a special class."""
    return not weight.is_floating_point() or type(weight.data) is not Tensor


# Frozen weights in the precision of autocast: half the memory, the same numbers, no cast at each use.


#: Layers whose weights autocast casts at every use. Normalisations are small, and on some devices autocast computes
#: them in fp32, so their weights are not changed.
CAST_BY_AUTOCAST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def lower_frozen(denoiser: nn.Module, dtype: torch.dtype) -> None:
    """Keep the frozen weights of linear layers and convolutions in ``dtype``, and always run the network in autocast.

    Trained weights stay in fp32. All results are the same as those of autocast with fp32 weights, which it would cast
    at each use (it keeps casts only of trained weights). Other layers that were read in ``dtype``, such as
    normalisations, become fp32 again. Drawing, probes and merges outside of a training step also run in autocast,
    because weights in ``dtype`` cannot be used with inputs in fp32.

    Quantised weights do not change: their layers compute in the inputs' format.

    Args:
        denoiser: the denoiser with all adapters attached.
        dtype: the dtype of autocast, such as bfloat16.
    """
    for layer in denoiser.modules():
        kept = dtype if isinstance(layer, CAST_BY_AUTOCAST) else torch.float32
        for weight in layer.parameters(recurse=False):
            if not weight.requires_grad and not is_quantized(weight):
                weight.data = weight.data.to(kept)
    network: Any = denoiser
    network.lowered_to = dtype
    network.forward = MethodType(_in_autocast, denoiser)


def leave_quantized(module: nn.Module) -> None:
    """Let DDP skip quantised weights when it synchronises at its start: all ranks have read the same ones."""
    from torch.nn.parallel import DistributedDataParallel

    names = [name for name, weight in module.named_parameters() if is_quantized(weight)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)


def _in_autocast(denoiser: Any, *args: Any, **kwargs: Any) -> Any:
    """`forward` of a lowered network. It becomes a bound method, so that a deep copy computes with its own weights."""
    # Casts are not kept, because a pass with gradient could find a cast that was made without gradient.
    with torch.autocast(next(denoiser.parameters()).device.type, denoiser.lowered_to, cache_enabled=False):
        found = type(denoiser).forward(denoiser, *args, **kwargs)
    return convert_to_fp32(found)  # samplers and decoders outside of autocast expect fp32
