"""The folders that PEFT's own `save_pretrained` writes: weights, and a configuration beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_safety.adapters.lora_layouts import COMPONENTS
from lit_safety.bounded import load_json
from lit_safety.errors import UserError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def find_peft(path: Path) -> tuple[Path, Path] | None:
    """Weights and configuration, where ``path`` is such a folder or the weights in one."""
    folder = path.parent if path.name == WEIGHTS else path
    weights, config = folder / WEIGHTS, folder / CONFIG
    return (weights, config) if weights.is_file() and config.is_file() else None


def with_component(tensors: Mapping[str, Tensor], config: Path, file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and settings by names that begin with the part of a pipeline that they adapt: PEFT does not say it.

    Raises:
        UserError: the configuration cannot be read, or the layers are of no known part.
    """
    bare = {key.removeprefix("base_model.model."): tensor for key, tensor in tensors.items()}
    own = _component(bare, file)
    named = {f"{own}.{key}": tensor for key, tensor in bare.items()}
    return named, {f"{own}.{key}": value for key, value in read_peft_config(config).items()}


def _component(layers: Iterable[str], file: Path) -> str:
    """Whose layers these are, by the beginnings of their names."""
    tops = {layer.split(".", 1)[0] for layer in layers}
    for component, known in COMPONENTS.items():
        if tops <= set(known):
            return component
    strange = min(tops.difference(*COMPONENTS.values()), default=", ".join(sorted(tops)))
    raise UserError(
        f"{file}: {strange} is neither of diffusers' UNets nor of its transformers; merge adapters of a denoiser, or "
        "write this one again with `pipe.save_lora_weights`"
    )


def read_peft_config(file: Path) -> dict[str, Any]:
    """PEFT's own configuration of a LoRA.

    Raises:
        UserError: it cannot be read, or is not one of a LoRA.
    """
    try:
        config = load_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type", "LORA") != "LORA":
        raise UserError(f"{file} describes no LoRA; merge LoRA adapters only")
    return config
