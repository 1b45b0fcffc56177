"""A LoRA's configuration as PEFT writes and reads it: its folders, and every layer's rank and alpha."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import regex

from lit_safety.adapters.layer_names import COMPONENTS, TEXT_MODEL
from lit_safety.adapters.low_rank import LowRank
from lit_safety.core.errors import UserError
from lit_safety.core.text import load_json

#: The folders that PEFT's own `save_pretrained` writes: weights, and a configuration next to them.
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"


def find_peft(path: Path) -> tuple[Path, Path] | None:
    """Weights and configuration, if ``path`` is such a folder or the weights in one."""
    folder = path.parent if path.name == PEFT_WEIGHTS else path
    weights, config = folder / PEFT_WEIGHTS, folder / PEFT_CONFIG
    return (weights, config) if weights.is_file() and config.is_file() else None


def peft_settings(layers: Iterable[str], config: Path, file: Path) -> dict[str, Any]:
    """The settings, by names that begin with the adapted part of a pipeline, which PEFT does not state.

    Args:
        layers: the names that `to_one_layout` found.
        config: the configuration.
        file: the weights, for messages.

    Raises:
        UserError: the configuration cannot be read, or the layers belong to an unknown part or to several parts.
    """
    parts = {layer.split(".", 1)[0] for layer in layers}
    if len(parts) != 1 or not parts <= set(COMPONENTS):
        strange = min(layers, default="the empty file")
        raise UserError(
            f"{file}: {strange} is not a layer of diffusers' UNets or transformers; give adapters of a denoiser, "
            "or write this one again with `pipe.save_lora_weights`"
        )
    return {f"{min(parts)}.{key}": value for key, value in read_peft_config(config).items()}


def read_peft_config(file: Path) -> dict[str, Any]:
    """PEFT's own configuration of a LoRA.

    Raises:
        UserError: it cannot be read, or does not describe a LoRA.
    """
    try:
        config = load_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type", "LORA") != "LORA":
        raise UserError(f"{file} does not describe a LoRA; only LoRA adapters are read")
    return config


class Alphas:
    """Every layer's alpha by PEFT's settings. Their `alpha_pattern` holds regular expressions of other people, so each
    has a time limit of a few seconds.

    Args:
        settings: a component's.
        file: for messages.
    """

    def __init__(self, settings: Mapping[str, Any], file: Path) -> None:
        self.settings = settings
        given = settings.get("alpha_pattern") or {}
        try:
            if not isinstance(given, Mapping):
                raise TypeError("alpha_pattern is not an object")
            # As PEFT completes them.
            self.patterns = [(regex.compile(rf"(.*\.)?({pattern})$"), alpha) for pattern, alpha in given.items()]
        except (TypeError, ValueError, OverflowError, RecursionError, regex.error) as error:
            raise UserError(f"{file}: its settings do not give an alpha ({error}); is the file complete?") from error

    def of(self, layer: str, where: str) -> float:
        try:
            told = (self._told(spelling) for spelling in (layer, layer.removeprefix(TEXT_MODEL)))
            found = next((alpha for alpha in told if alpha is not None), None)
            alpha = float(self.settings["lora_alpha"] if found is None else found)
        except TimeoutError as error:
            raise UserError(
                f"{where}: a pattern of its alpha_pattern takes too long; list the layers instead"
            ) from error
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{where}: its settings do not give an alpha ({error}); is the file complete?") from error
        if not math.isfinite(alpha):
            raise UserError(f"{where}: its alpha is {alpha}; train this adapter again")
        return alpha

    def _told(self, layer: str) -> Any:
        return next((alpha for pattern, alpha in self.patterns if pattern.match(layer, timeout=1)), None)


def configuration(layers: Mapping[str, LowRank], component: str = "unet") -> dict[str, Any]:
    """The arguments of PEFT's `LoraConfig` that give every layer its own rank and scale.

    Args:
        layers: by their names in the network.
        component: for a text encoder only the ends of names count, because the rest differs between releases of
            transformers.
    """
    ranks = {name: layer.rank for name, layer in layers.items()}
    alphas = {name: _tidy(layer.scale * layer.rank) for name, layer in layers.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {_pattern(name, component): r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {_pattern(name, component): a for name, a in alphas.items() if a != alpha},
        "target_modules": sorted(_ending(name, component) for name in layers),
    }


def _ending(layer: str, component: str) -> str:
    """The layer's name without the prefix of some releases of transformers; PEFT matches the ends of names."""
    return layer.removeprefix(TEXT_MODEL) if component.startswith("text_encoder") else layer


def _pattern(layer: str, component: str) -> str:
    """PEFT matches the end of a layer's name; `^` makes that the whole name, as diffusers writes it.

    Layers of text encoders have other names in other releases of transformers, so there only the end is matched.
    """
    whole = "" if component.startswith("text_encoder") else "^"
    return whole + re.escape(_ending(layer, component))


def _tidy(alpha: float) -> float | int:
    return int(alpha) if float(alpha).is_integer() else float(alpha)
