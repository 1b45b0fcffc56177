"""The layers of a base model by its configuration alone, so that experts are checked without its weights."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import torch
from torch import nn

from lit_safety.adapters.lora_layouts import Place, places_of
from lit_safety.backbones.parts import Parts
from lit_safety.backbones.pipeline_index import LIBRARIES
from lit_safety.errors import UserError

#: The parts of a pipeline that a LoRA may adapt.
COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")


def base_layers(base: str) -> dict[str, dict[str, Place]] | None:
    """The layers of every part of a pipeline that a LoRA may adapt; None: its configuration is not on this machine.

    Args:
        base: a pipeline's folder, or a hub id, of which only what has been fetched already is looked at.

    Raises:
        UserError: the folder is no pipeline, or describes a network that this release of diffusers does not know.
    """
    folder = _at_hand(base)
    if folder is None:
        return None
    parts = Parts(str(folder))
    return {name: places_of(_network(parts, name), name) for name in COMPONENTS if parts.has(name)}


def _at_hand(base: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if Path(base).is_dir():
        return Path(base)
    try:
        index = try_to_load_from_cache(base, "model_index.json")
    except HFValidationError:  # neither a folder nor a hub id
        return None
    if not isinstance(index, str):
        return None
    folder = Path(index).parent
    named = Parts(str(folder)).index.components
    fetched = all((folder / name / "config.json").is_file() for name in COMPONENTS if name in named)
    return folder if fetched else None


def _network(parts: Parts, name: str) -> nn.Module:
    """The network without memory for its weights."""
    library, class_name = parts.index.components[name]
    found = getattr(import_module(library), class_name, None) if library in LIBRARIES else None
    if found is None:
        raise UserError(f"the pipeline {parts.source} does not load: its {name} is {library}.{class_name}")
    config = parts.config(name)
    try:
        with torch.device("meta"):
            if library == "diffusers":
                return found.from_config(config)
            return found(found.config_class.from_dict(config))
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"the pipeline {parts.source} does not load: {name}/config.json: {first_line}") from error
