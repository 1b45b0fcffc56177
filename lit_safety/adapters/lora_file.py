"""LoRA files as low-rank factors, in and out: alpha and rank of every layer as stock diffusers and PEFT read them."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lit_safety.adapters.lora import WEIGHTS_NAME, find_weights
from lit_safety.adapters.lora_layouts import COMPONENTS, refuse_keys, refuse_settings, to_one_layout
from lit_safety.adapters.peft_folder import find_peft, with_component
from lit_safety.bounded import load_json
from lit_safety.errors import UserError

#: Where diffusers keeps the LoRA configuration in a safetensors file.
METADATA_KEY = "lora_adapter_metadata"
#: What the layers of CLIP's text encoder begin with in older releases of transformers, and in its files.
TEXT_MODEL = "text_model."


@dataclass(frozen=True)
class LowRank:
    """The update of one layer: delta = scale * b @ a. Rank 0 is the zero update."""

    a: Tensor
    """(r, in); of a convolution in = in_channels * kh * kw."""
    b: Tensor
    """(out, r)"""
    scale: float = 1.0
    """alpha / r, or alpha / sqrt(r) where the file says that it is rank-stabilised."""
    kernel: tuple[int, ...] = ()
    """(kh, kw) of a convolution; empty for a linear layer."""

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        return self.b.shape[0], self.a.shape[1]

    def delta(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The whole update, (out, in)."""
        return (self.b.to(dtype) @ self.a.to(dtype)) * self.scale


def read_lora(path: str | Path) -> dict[str, LowRank]:
    """All layers of a LoRA folder or file by `{component}.{layer}` (such as `unet.mid_block...to_q`), sorted by name.

    Raises:
        UserError: the file is missing or damaged, holds numbers that are not finite, or is no plain LoRA.
    """
    file, config = _locate(Path(path))
    tensors, metadata = _load(file)
    if config is not None:
        tensors, metadata = with_component(tensors, config, file)
    refuse_keys(tensors, file)
    tensors, alphas = to_one_layout(tensors, file)
    settings = {c: _settings(metadata, c) for c in {key.split(".", 1)[0] for key in tensors}}
    for one in settings.values():
        refuse_settings(one, file)
    layers = {}
    for name in sorted({key.split(".lora_")[0] for key in tensors if ".lora_" in key}):
        pair = [tensors.pop(f"{name}.lora_{side}.weight", None) for side in "AB"]
        if pair[0] is None or pair[1] is None:
            raise UserError(f"{file}: {name} has no pair of lora_A.weight and lora_B.weight; is the file complete?")
        component, _, layer = name.partition(".")
        if component not in COMPONENTS and not component.startswith("text_encoder"):
            raise UserError(f"{file}: {name} is in no known part of a pipeline; give a LoRA's folder, PEFT's whole")
        found = _layer(pair[0], pair[1], settings[component], layer, alphas.get(name), f"{file}: {name}")
        layers[_told_alike(component, layer)] = found
    if tensors or not layers:
        raise UserError(f"{file}: {next(iter(tensors), 'the empty file')} belongs to no plain LoRA; merge those only")
    return dict(sorted(layers.items()))


def _told_alike(component: str, layer: str) -> str:
    """The name of a layer, whichever release of transformers wrote it: newer ones leave `text_model.` out of CLIP's."""
    left_out = component.startswith("text_encoder") and layer.startswith("encoder.layers.")
    return f"{component}.{TEXT_MODEL if left_out else ''}{layer}"


def _locate(path: Path) -> tuple[Path, Path | None]:
    """The weights, and PEFT's configuration where the folder is PEFT's."""
    if (own := find_peft(path)) is not None:
        return own
    if path.is_dir() and not (path / WEIGHTS_NAME).is_file():
        found = sorted(path.glob("*.safetensors"))
        if len(found) == 1:
            return found[0], None
    return find_weights(path), None


def _load(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(file, framework="pt") as handle:
            tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
            raw = (handle.metadata() or {}).get(METADATA_KEY)
        metadata = load_json(raw) if raw else {}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file} is no readable safetensors file: {error}") from error
    if not isinstance(metadata, dict):
        raise UserError(f"{file}: its {METADATA_KEY} is no JSON object")
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor.float()).all():  # in float, which 8-bit numbers need
            raise UserError(f"{file}: {key} holds numbers that are not finite; train this adapter again")
    return tensors, metadata


def _settings(metadata: Mapping[str, Any], component: str) -> dict[str, Any]:
    prefix = f"{component}."
    return {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}


def _layer(
    a: Tensor, b: Tensor, settings: Mapping[str, Any], layer: str, stored_alpha: float | None, where: str
) -> LowRank:
    kernel = tuple(a.shape[2:])
    of_a_layer = len(a.shape) in (2, 4) and len(b.shape) == len(a.shape) and a.numel() > 0 and b.numel() > 0
    if not of_a_layer or b.shape[1] != a.shape[0] or any(side != 1 for side in b.shape[2:]):
        raise UserError(
            f"{where}: factors of shape {tuple(a.shape)} and {tuple(b.shape)} are no LoRA of a linear layer or an "
            "ungrouped convolution"
        )
    rank = a.shape[0]
    alpha = rank if stored_alpha is None else stored_alpha  # diffusers' convention where a file says nothing
    if "lora_alpha" in settings:
        alpha = _alpha_of(settings, layer, where)
    stabilised = bool(settings.get("use_rslora"))
    scale = alpha / (math.sqrt(rank) if stabilised else rank)
    return LowRank(a.flatten(1), b.flatten(1), scale, kernel)


def _alpha_of(settings: Mapping[str, Any], layer: str, where: str) -> float:
    """A layer's alpha by PEFT's settings."""
    from peft.utils.other import get_pattern_key

    pattern = settings.get("alpha_pattern") or {}
    try:
        alpha = float(pattern.get(get_pattern_key(list(pattern), layer), settings["lora_alpha"]))
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise UserError(f"{where}: its settings tell no alpha ({error}); is the file whole?") from error
    if not math.isfinite(alpha):
        raise UserError(f"{where}: its alpha is {alpha}; train this adapter again")
    return alpha


def write_lora(file: Path, layers: Mapping[str, LowRank]) -> Path:
    """Write `file` as stock `load_lora_weights` reads it; layers are named `{component}.{layer}`.

    Layers of rank 0 are left out: they change nothing.

    Raises:
        UserError: no layer is left.
    """
    kept = {name: layers[name] for name in sorted(layers) if layers[name].rank > 0}
    if not kept:
        raise UserError(f"{file}: the adapter would change nothing, no layer has an update")
    tensors = {}
    for name, layer in kept.items():
        ones = (1,) * len(layer.kernel)
        channels = layer.shape[1] // math.prod(layer.kernel)
        tensors[f"{name}.lora_A.weight"] = layer.a.reshape(layer.rank, channels, *layer.kernel).contiguous()
        tensors[f"{name}.lora_B.weight"] = layer.b.reshape(layer.shape[0], layer.rank, *ones).contiguous()
    metadata: dict[str, Any] = {}
    for component in sorted({name.split(".", 1)[0] for name in kept}):
        prefix = f"{component}."
        own = {name.removeprefix(prefix): layer for name, layer in kept.items() if name.startswith(prefix)}
        metadata |= {prefix + key: value for key, value in _configuration(own, component).items()}
    save_file(tensors, file, {"format": "pt", METADATA_KEY: json.dumps(metadata, indent=2, sort_keys=True)})
    return file


def _configuration(layers: Mapping[str, LowRank], component: str) -> dict[str, Any]:
    """What PEFT's `LoraConfig` needs to give every layer its own rank and scale."""
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
    """The layer's name without what only some releases of transformers begin it with; PEFT matches names' ends."""
    return layer.removeprefix(TEXT_MODEL) if component.startswith("text_encoder") else layer


def _pattern(layer: str, component: str) -> str:
    """PEFT matches the end of a layer's name; `^` makes that the whole name, as diffusers writes it.

    Text encoders are called by other names in other releases of transformers, so there only the end is matched.
    """
    whole = "" if component.startswith("text_encoder") else "^"
    return whole + re.escape(_ending(layer, component))


def _tidy(alpha: float) -> float | int:
    return int(alpha) if float(alpha).is_integer() else float(alpha)
