"""The folders that PEFT's own `save_pretrained` writes: weights, and a configuration beside them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lit_safety.adapters.lora_layouts import COMPONENTS
from lit_safety.bounded import load_json
from lit_safety.errors import UserError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def find_peft(path: Path) -> tuple[Path, Path] | None:
    """Weights and configuration, where ``path`` is such a folder or the weights in one."""
    folder = path.parent if path.name == WEIGHTS else path
    weights, config = folder / WEIGHTS, folder / CONFIG
    return (weights, config) if weights.is_file() and config.is_file() else None


def peft_settings(layers: Iterable[str], config: Path, file: Path) -> dict[str, Any]:
    """The settings by names that begin with the part of a pipeline that is adapted: PEFT does not say it.

    Args:
        layers: the names that `to_one_layout` found.
        config: the configuration.
        file: the weights, for messages.

    Raises:
        UserError: the configuration cannot be read, or the layers are of no known part, or of several.
    """
    parts = {layer.split(".", 1)[0] for layer in layers}
    if len(parts) != 1 or not parts <= set(COMPONENTS):
        strange = min(layers, default="the empty file")
        raise UserError(
            f"{file}: {strange} is neither of diffusers' UNets nor of its transformers; give adapters of a denoiser, "
            "or write this one again with `pipe.save_lora_weights`"
        )
    return {f"{min(parts)}.{key}": value for key, value in read_peft_config(config).items()}


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
        raise UserError(f"{file} describes no LoRA; give LoRA adapters only")
    return config
