"""The LoRA that may be trained together with user attention, and is saved and loaded with it.

Ours, not the paper's: Personalized Safety Alignment (arXiv 2508.01151) trains user attention alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lit_safety.adapters.lora import LoRA
from lit_safety.core.errors import UserError

#: Its name for PEFT in a pipeline that draws for users.
ADAPTER = "users"
PREFIX = "lora."
_SIDES = ("lora_A", "lora_B")


@dataclass(frozen=True)
class UserLoRA:
    """Its part of a file, checked against a UNet."""

    rank: int
    alpha: float
    tensors: dict[str, Tensor]
    """`{layer}.lora_A.weight` (rank, in) and `{layer}.lora_B.weight` (out, rank); convolutions have their kernels."""

    @property
    def layers(self) -> list[str]:
        """Names of the adapted layers."""
        return sorted({_layer(name) for name in self.tensors})

    def attach(self, unet: Any) -> None:
        """Put it into `unet`, frozen and in its precision, next to the LoRAs that are active there.

        Raises:
            UserError: another LoRA is fused there: PEFT then ignores all others in such a layer.
        """
        if any(layer.merged for layer in _tuned(unet).values()):
            raise UserError(
                "a LoRA is fused into this pipeline: call pipe.unfuse_lora(), then load_psa, then fuse both"
            )
        active = {name: list(layer.active_adapters) for name, layer in _tuned(unet).items()}
        LoRA(self.rank, self.alpha, self.layers).attach(unet, ADAPTER)
        for name, layer in _tuned(unet).items():
            # `attach` switches all others off.
            layer.set_adapter([*active.get(name, []), *([ADAPTER] if ADAPTER in layer.scaling else [])])
        copy_weights(unet, ADAPTER, self.tensors)
        for name, parameter in unet.named_parameters():
            if f".{ADAPTER}." in name:
                parameter.requires_grad_(False)
                parameter.data = parameter.data.to(unet.dtype)


def state(unet: Any, adapter: str) -> dict[str, Tensor]:
    """The weights of one of `unet`'s LoRAs by their names in the file of a user adapter."""
    return {f"{PREFIX}{name}": tensor for name, tensor in get_peft_model_state_dict(unet, adapter_name=adapter).items()}


def settings(unet: Any, adapter: str) -> dict[str, float]:
    """Rank and alpha of one of `unet`'s LoRAs, for the metadata of the file."""
    config = unet.peft_config[adapter]
    return {"rank": config.r, "alpha": config.lora_alpha}


def read(unet: Any, tensors: Mapping[str, Tensor], about: Mapping[str, Any], file: Path) -> UserLoRA | None:
    """The LoRA of a user adapter's file: its tensors (`lora.*`) and metadata; None: it has none.

    Raises:
        UserError: it does not fit `unet`, or rank and alpha are missing.
    """
    own = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
    found = about.get("lora")
    if not own and found is None:
        return None
    rank, alpha = (found.get("rank"), found.get("alpha")) if isinstance(found, dict) else (None, None)
    if not own or type(rank) is not int or rank < 1 or not isinstance(alpha, (int, float)) or not 0 < alpha < 1e6:
        raise UserError(f"{file}: its LoRA has no weights, or no rank and alpha in the metadata")
    another = f"{file} was made for another backbone"
    for name, tensor in own.items():
        layer, side = _layer(name), name.rpartition(".lora_")[2]
        wanted = _shapes(unet, layer, rank).get(side)
        if wanted is None:
            raise UserError(f"{another}: this model lacks a linear or convolution layer for {name}")
        if tuple(tensor.shape) != wanted:
            raise UserError(f"{another}: {name} has shape {tuple(tensor.shape)}, not {wanted}")
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise UserError(f"{file}: {name} holds numbers that are not finite or not floating-point")
    lora = UserLoRA(rank, float(alpha), own)
    missing = {f"{layer}.{side}.weight" for layer in lora.layers for side in _SIDES} - set(own)
    if missing:
        raise UserError(f"{file}: {min(missing)} is missing; is the file complete?")
    return lora


def _shapes(unet: nn.Module, layer: str, rank: int) -> dict[str, tuple[int, ...]]:
    """The shapes of A and B for a linear layer or a convolution; empty if there is no such layer."""
    try:
        module: Any = unet.get_submodule(layer)
    except AttributeError:
        return {}
    module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if isinstance(module, nn.Linear):
        return {"A.weight": (rank, module.in_features), "B.weight": (module.out_features, rank)}
    if isinstance(module, nn.Conv2d):
        inside = (rank, module.in_channels // module.groups, *module.kernel_size)
        return {"A.weight": inside, "B.weight": (module.out_channels, rank, 1, 1)}
    return {}


def copy_weights(unet: nn.Module, adapter: str, tensors: Mapping[str, Tensor]) -> None:
    """Put a file's tensors into the LoRA `adapter` that `unet` has."""
    parameters = dict(unet.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name.removesuffix("weight") + f"{adapter}.weight"].copy_(tensor)


def lost(unet: nn.Module, layers: tuple[str, ...]) -> str | None:
    """The first of `layers` in which the LoRA is no longer active; None: it is active in all."""
    for name in layers:
        layer = unet.get_submodule(name)
        if not isinstance(layer, BaseTunerLayer) or layer.disable_adapters:
            return name
        if ADAPTER not in (layer.merged_adapters if layer.merged else layer.active_adapters):
            return name
    return None


def keep_active(unet: nn.Module) -> None:
    """Make the LoRA active again if loading another one has switched it off. Does nothing without such a LoRA."""
    for layer in _tuned(unet).values():
        if ADAPTER in layer.scaling and ADAPTER not in layer.active_adapters:
            layer.set_adapter([*layer.active_adapters, ADAPTER])


def set_scale(unet: nn.Module, scale: float) -> None:
    """Set its weight; 0 is the base model."""
    for layer in _tuned(unet).values():
        if ADAPTER in layer.scaling:
            layer.set_scale(ADAPTER, scale)


def remove(unet: Any) -> None:
    """Remove it; other LoRAs stay.

    Raises:
        UserError: it is fused, so that it would stay in the weights.
    """
    if ADAPTER not in getattr(unet, "peft_config", {}):
        return
    if any(ADAPTER in layer.merged_adapters for layer in _tuned(unet).values()):
        raise UserError("the user adapter's LoRA is fused: call pipe.unfuse_lora() first")
    if len(unet.peft_config) == 1:
        unet.unload_lora()
    else:
        unet.delete_adapters(ADAPTER)


def _layer(name: str) -> str:
    return name.rpartition(".lora_")[0]


def _tuned(unet: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in unet.named_modules() if isinstance(module, BaseTunerLayer)}
