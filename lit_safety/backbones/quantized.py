"""Frozen weights in 8 or 4 bits: what diffusers is asked for, and how such a weight is told from others.

Only networks that are loaded so import this file, and only they the packages.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from lit_safety.core.errors import UserError

KEY = "model.init_args.backbone.init_args.denoiser_quantization"


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
