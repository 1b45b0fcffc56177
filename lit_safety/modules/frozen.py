"""Weights that are not trained: in half precision next to a LoRA, or copied as the reference of a full fine-tune."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils.operations import convert_to_fp32
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import nn

from lit_safety.core.errors import UserError

if TYPE_CHECKING:
    from lit_safety.backbones.backbone import Backbone

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
    from lit_safety.backbones.quantized import is_quantized

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

    from lit_safety.backbones.quantized import is_quantized

    names = [name for name, weight in module.named_parameters() if is_quantized(weight)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)


def _in_autocast(denoiser: Any, *args: Any, **kwargs: Any) -> Any:
    """`forward` of a lowered network; a bound method, so that a deep copy of it computes with weights of its own."""
    # Casts are not kept: one made without gradient would be found by a pass with gradient.
    with torch.autocast(next(denoiser.parameters()).device.type, denoiser.lowered_to, cache_enabled=False):
        found = type(denoiser).forward(denoiser, *args, **kwargs)
    return convert_to_fp32(found)  # as samplers and decoders outside of autocast expect it


# Training the whole denoiser instead of an adapter: then the reference is a frozen copy, not the same network.


class FrozenCopy:
    """A copy of the denoiser as it is now; no module of anything, so that no checkpoint or strategy takes hold of it.

    Args:
        backbone: whose denoiser is copied, before anything was trained.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self._denoiser = copy.deepcopy(backbone.denoiser).requires_grad_(False).eval()

    @property
    def denoiser(self) -> nn.Module:
        return self._denoiser

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the backbone computes with the copy, by its own arithmetic."""
        modules: dict[str, Any] = self._backbone._modules
        trained = modules["denoiser"]
        modules["denoiser"] = self._denoiser.to(self._backbone.device)
        try:
            yield
        finally:
            modules["denoiser"] = trained


def make_all_trainable(denoiser: nn.Module) -> None:
    """Every weight in fp32 and with a gradient."""
    denoiser.float().requires_grad_(True)


def check_strategy(trainer: Trainer | None, reference_cached: bool = False) -> None:
    """Refuse what a full fine-tune cannot be trained with.

    Args:
        trainer: with its strategy.
        reference_cached: all pairs come with the reference's errors, so that no frozen copy is held.

    Raises:
        UserError: a frozen copy under ZeRO 3, which shards every network that exists when it begins.
    """
    strategy = None if trainer is None else trainer.strategy
    if isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3 and not reference_cached:
        raise UserError(
            "`model.init_args.policy: full` holds a frozen copy of the denoiser as its reference, and ZeRO 3 cannot "
            "leave it whole: use ZeRO 1 or 2, `policy: lora`, or shards with a reference cache for training and "
            "validation (`shards precompute --reference_draws`)"
        )
