"""Frozen weights in less than float32 next to a LoRA: in half precision, or in 8 or 4 bits.

Only runs that ask for them import this file, and only the package that is asked for is needed.
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


# In 8 or 4 bits: what diffusers is asked for, and how such a weight is told from others.


def configuration(kind: str, dtype: torch.dtype) -> Any:
    """diffusers' configuration for a kind of `settings.Quantization`; it computes in ``dtype``.

    Raises:
        UserError: the package is not installed, or there is no GPU for it.
    """
    package, bits = kind.removesuffix("bit").rsplit("_", 1)
    if find_spec(package) is None:
        raise UserError(f"`{KEY}: {kind}`: needs the package {package}: pip install {package}")
    if package == "torchao":
        from diffusers import TorchAoConfig
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    if not torch.cuda.is_available():
        raise UserError(f"`{KEY}: {kind}`: bitsandbytes needs a GPU, and there is none here: take torchao_8bit")
    from diffusers import BitsAndBytesConfig

    if bits == "8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def is_quantized(weight: Tensor) -> bool:
    """Whether a weight is kept in fewer bits: bytes, as bitsandbytes has them, or a tensor of a class of its own."""
    return not weight.is_floating_point() or type(weight.data) is not Tensor


# Frozen weights in the precision that autocast computes in: half the memory, the same numbers, no cast at each use.


#: Layers whose weights autocast casts at every use. Normalisations it computes in fp32, on some devices, and they are
#: small: theirs stay as they are.
CAST_BY_AUTOCAST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def lower_frozen(denoiser: nn.Module, dtype: torch.dtype) -> None:
    """Keep the frozen weights of linear layers and convolutions in ``dtype``, and always run the network in autocast.

    What is trained stays in fp32. Every number is the one that autocast gives with weights in fp32, whose cast it
    would do at each use (it keeps casts only of what is trained); what was read in ``dtype`` besides, such as
    normalisations, is fp32 again. Whoever draws, probes or merges outside of a training step gets autocast too: weights
    in ``dtype`` cannot meet inputs in fp32.

    Weights in fewer bits stay as they are: their layers compute in the inputs' format.

    Args:
        denoiser: with all adapters attached.
        dtype: of autocast, such as bfloat16.
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
    """Let DDP leave weights in fewer bits out of what it sends at its start: all ranks have read the same ones."""
    from torch.nn.parallel import DistributedDataParallel

    names = [name for name, weight in module.named_parameters() if is_quantized(weight)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)


def _in_autocast(denoiser: Any, *args: Any, **kwargs: Any) -> Any:
    """`forward` of a lowered network; a bound method, so that a deep copy of it computes with weights of its own."""
    # Casts are not kept: one made without gradient would be found by a pass with gradient.
    with torch.autocast(next(denoiser.parameters()).device.type, denoiser.lowered_to, cache_enabled=False):
        found = type(denoiser).forward(denoiser, *args, **kwargs)
    return convert_to_fp32(found)  # as samplers and decoders outside of autocast expect it
