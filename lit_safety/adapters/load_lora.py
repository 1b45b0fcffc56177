"""Load any LoRA file into a stock pipeline: every layer of the file must exist there, or the file is refused."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from lit_safety.adapters import user_lora
from lit_safety.adapters.layer_names import AdaptableLayer, adaptable_layers
from lit_safety.adapters.lora_file import Convert, NotPlain, find_lora, read_lora
from lit_safety.adapters.low_rank import LowRank, factors_of
from lit_safety.adapters.peft_config import configuration
from lit_safety.core.errors import UserError


def load_lora(pipe: Any, path: str | Path, scale: float = 1.0, name: str = "lit_safety") -> None:
    """Load a LoRA folder or file into a stock diffusers pipeline with the weight ``scale``.

    A scale of 0 is the base model, 1 the trained one; a negative scale pushes the model *towards* harm. Parts for text
    encoders are loaded if the pipeline has those encoders. Other LoRAs in the pipeline are switched off, as in stock
    diffusers, except the LoRA of a user adapter.

    Raises:
        UserError: the file is missing or damaged, was made for another backbone, or holds a layer that does not exist
            here.
    """
    file, _ = find_lora(path)
    if (getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)) is None:
        raise UserError(f"{type(pipe).__name__} has no unet and no transformer, so {file} cannot be loaded into it")
    networks = _networks(pipe)
    if not networks:
        raise UserError(f"{file} cannot be loaded: stock diffusers does not support LoRAs in {type(pipe).__name__}")
    if any(name in getattr(network, "peft_config", {}) for network in networks.values()):
        raise UserError(f"{file} cannot be loaded as {name}: the pipeline already has an adapter with this name")
    try:
        _load(pipe, networks, path, name)
        pipe.set_adapters([name], [scale])
        for network in networks.values():
            user_lora.keep_active(network)  # diffusers has just switched it off with all others
    except (ValueError, RuntimeError, KeyError) as error:
        _take_out(pipe, networks, name)
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{file} does not load into {type(pipe).__name__}: {first_line}") from error
    except UserError:
        _take_out(pipe, networks, name)
        raise


def _load(pipe: Any, networks: Mapping[str, nn.Module], path: str | Path, name: str) -> None:
    known = {component: adaptable_layers(network, component) for component, network in networks.items()}
    file, config = find_lora(path)
    try:
        layers = read_lora(path, known, _converter(pipe))
    except NotPlain as error:
        if config is not None or not error.stock:
            raise
        _load_stock(pipe, file, name, error)
        return
    for component, network in networks.items():
        prefix = f"{component}."
        own = {layer.removeprefix(prefix): update for layer, update in layers.items() if layer.startswith(prefix)}
        if own:
            _put(pipe, network, {known[component][layer]: update for layer, update in own.items()}, name, file)


def _take_out(pipe: Any, networks: Mapping[str, nn.Module], name: str) -> None:
    """Remove every part of an adapter that was refused."""
    if any(name in getattr(network, "peft_config", {}) for network in networks.values()):
        pipe.delete_adapters(name)


def fuse_loras(pipe: Any, safe_fusing: bool = False) -> None:
    """Fuse all active LoRAs into the weights of every network that has one, also of text encoders."""
    adapted = [name for name, network in _networks(pipe).items() if getattr(network, "peft_config", None)]
    if adapted:
        pipe.fuse_lora(components=adapted, safe_fusing=safe_fusing)


def adapted_weights(pipe: Any) -> list[Tensor]:
    """The weights and biases into which `fuse_loras` would fuse something."""
    layers = (module for network in _networks(pipe).values() for module in network.modules())
    return [
        weight
        for layer in layers
        if isinstance(layer, BaseTunerLayer)
        for weight in layer.get_base_layer().parameters()
    ]


def _networks(pipe: Any) -> dict[str, nn.Module]:
    """The parts of the pipeline into which stock diffusers can load LoRAs."""
    parts = {name: getattr(pipe, name, None) for name in getattr(pipe, "_lora_loadable_modules", ())}
    return {name: part for name, part in parts.items() if isinstance(part, nn.Module)}


def _converter(pipe: Any) -> Convert:
    """The conversion of a whole file's names by this family's stock pipeline."""
    unet = getattr(pipe, "unet", None)
    return converter(type(pipe), None if unet is None else unet.config)


def converter(kind: Any, unet_config: Any = None) -> Convert:
    """The conversion of a whole file's names by a class of stock pipelines.

    Args:
        kind: the class.
        unet_config: that of its UNet, if it has one.
    """

    def convert(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
        read = kind.lora_state_dict
        extra: dict[str, Any] = {"return_alphas": True} if "return_alphas" in inspect.signature(read).parameters else {}
        if unet_config is not None:
            extra["unet_config"] = unet_config
        found = read(tensors, **extra)
        state, alphas = (found[0], found[1] or {}) if isinstance(found, tuple) else (found, {})
        return state, {key: float(alpha) for key, alpha in alphas.items()}

    return convert


def _put(pipe: Any, network: Any, layers: Mapping[AdaptableLayer, LowRank], name: str, file: Path) -> None:
    """Add an adapter to a network, and check that the network holds it exactly."""
    dtype = next(p for p in network.parameters() if p.is_floating_point()).dtype
    own = {layer.name: update for layer, update in layers.items()}
    state = {
        f"{layer}.lora_{side}.weight": factor.to(dtype)
        for layer, update in own.items()
        for side, factor in zip("AB", factors_of(update), strict=True)
    }
    settings = configuration(own)
    settings["target_modules"] = "|".join(map(re.escape, own))  # whole names; a list would be matched by their ends
    if hasattr(network, "load_lora_adapter"):
        network.load_lora_adapter(
            dict(state), prefix=None, adapter_name=name, metadata=settings, low_cpu_mem_usage=True, _pipeline=pipe
        )
    else:  # a network of transformers, whose own loader would rename layers
        config = LoraConfig(**settings)
        inject_adapter_in_model(config, network, adapter_name=name, state_dict=state, low_cpu_mem_usage=True)
        set_peft_model_state_dict(network, dict(state), name, low_cpu_mem_usage=True)
        network._hf_peft_config_loaded = True
    lost = [layer for layer, update in own.items() if not _is_there(network.get_submodule(layer), name, update, state)]
    if lost:
        raise UserError(f"{file}: {len(lost)} of {len(own)} layers did not load, such as {min(lost)}")


def _is_there(module: Any, name: str, update: LowRank, state: Mapping[str, Tensor]) -> bool:
    if name not in getattr(module, "lora_A", {}):
        return False
    held = (module.lora_A[name].weight, module.lora_B[name].weight)
    same = all(
        torch.equal(weight.detach().cpu(), factor.to(weight.dtype).cpu())
        for weight, factor in zip(held, factors_of(update), strict=True)
    )
    return same and math.isclose(module.scaling[name], update.scale, rel_tol=1e-6, abs_tol=1e-12)


def _load_stock(pipe: Any, file: Path, name: str, error: NotPlain) -> None:
    """Load adapters that are more than two factors (DoRA, LoKr, biases) by stock diffusers, and count the tensors.

    Raises:
        UserError: the tensors in the network are not exactly those of the file.
    """
    given = load_file(file)
    pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name=name)
    wanted = sorted(_marks(tensor for key, tensor in given.items() if not key.endswith(".alpha")))
    parameters = (p for network in _networks(pipe).values() for p in network.named_parameters())
    found = sorted(_marks(parameter.detach() for key, parameter in parameters if f".{name}" in key))
    alike = [
        one == other and math.isclose(size, held, rel_tol=2e-2, abs_tol=1e-6)
        for (one, size), (other, held) in zip(wanted, found, strict=False)
    ]
    if len(wanted) != len(found) or not all(alike):
        raise UserError(f"{error}; stock diffusers loads {len(found)} of its {len(wanted)} tensors")


def _marks(tensors: Iterator[Tensor]) -> Iterator[tuple[int, float]]:
    """How many numbers a tensor has and their size: neither renaming nor transposing changes them."""
    return ((tensor.numel(), float(tensor.double().square().sum())) for tensor in tensors)
