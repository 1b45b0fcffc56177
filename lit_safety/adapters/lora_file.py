"""LoRA files as low-rank factors, in and out: alpha and rank of every layer as stock diffusers and PEFT read them."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lit_safety.adapters.lora import WEIGHTS_NAME, find_weights
from lit_safety.adapters.lora_layouts import refuse_keys, refuse_settings, to_one_layout
from lit_safety.errors import UserError

#: Where diffusers keeps the LoRA configuration in a safetensors file.
METADATA_KEY = "lora_adapter_metadata"
#: What PEFT's own `save_pretrained` writes.
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
#: PEFT's files do not say which part of a pipeline they adapt: how the names of its layers begin.
PEFT_COMPONENTS = {
    "unet": ("down_blocks", "mid_block", "up_blocks", "conv_in", "conv_out", "time_embedding", "add_embedding"),
    "transformer": (
        *("transformer_blocks", "single_transformer_blocks", "context_embedder", "x_embedder", "time_text_embed"),
        *("pos_embed", "norm_out", "proj_out"),
    ),
}


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
        tensors = {key.removeprefix("base_model.model."): tensor for key, tensor in tensors.items()}
        own = _peft_component(tensors, file)
        tensors = {f"{own}.{key}": tensor for key, tensor in tensors.items()}
        metadata = {f"{own}.{key}": value for key, value in read_peft_config(config).items()}
    refuse_keys(tensors, file)
    tensors, alphas = to_one_layout(tensors, file)
    settings = {c: _settings(metadata, c) for c in {key.split(".", 1)[0] for key in tensors}}
    for one in settings.values():
        refuse_settings(one, file)
    layers = {}
    for name in sorted({key.split(".lora_")[0] for key in tensors}):
        pair = [tensors.pop(f"{name}.lora_{side}.weight", None) for side in "AB"]
        if pair[0] is None or pair[1] is None:
            raise UserError(f"{file}: {name} has no pair of lora_A.weight and lora_B.weight; is the file complete?")
        component, _, layer = name.partition(".")
        if component not in PEFT_COMPONENTS and not component.startswith("text_encoder"):
            raise UserError(f"{file}: {name} is in no known part of a pipeline; give a LoRA's folder, PEFT's whole")
        layers[name] = _layer(pair[0], pair[1], settings[component], layer, alphas.get(name), f"{file}: {name}")
    if tensors or not layers:
        raise UserError(f"{file}: {next(iter(tensors), 'the empty file')} belongs to no plain LoRA; merge those only")
    return layers


def _locate(path: Path) -> tuple[Path, Path | None]:
    """The weights, and PEFT's configuration where the folder is PEFT's."""
    folder = path.parent if path.name == PEFT_WEIGHTS else path
    if (folder / PEFT_WEIGHTS).is_file() and (folder / PEFT_CONFIG).is_file():
        return folder / PEFT_WEIGHTS, folder / PEFT_CONFIG
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
        metadata = json.loads(raw) if raw else {}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file} is no readable safetensors file: {error}") from error
    if not isinstance(metadata, dict):
        raise UserError(f"{file}: its {METADATA_KEY} is no JSON object")
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{file}: {key} holds numbers that are not finite; train this adapter again")
    return tensors, metadata


def _peft_component(layers: Iterable[str], file: Path) -> str:
    """Whose layers these are, by the beginnings of their names."""
    tops = {layer.split(".", 1)[0] for layer in layers}
    for component, known in PEFT_COMPONENTS.items():
        if tops <= set(known):
            return component
    strange = min(tops.difference(*PEFT_COMPONENTS.values()), default=", ".join(sorted(tops)))
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
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type", "LORA") != "LORA":
        raise UserError(f"{file} describes no LoRA; merge LoRA adapters only")
    return config


def _settings(metadata: Mapping[str, Any], component: str) -> dict[str, Any]:
    prefix = f"{component}."
    return {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}


def _layer(
    a: Tensor, b: Tensor, settings: Mapping[str, Any], layer: str, stored_alpha: float | None, where: str
) -> LowRank:
    kernel = tuple(a.shape[2:])
    if b.shape[1] != a.shape[0] or any(side != 1 for side in b.shape[2:]) or len(b.shape) != len(a.shape):
        raise UserError(
            f"{where}: factors of shape {tuple(a.shape)} and {tuple(b.shape)} are no LoRA of a linear layer or an "
            "ungrouped convolution"
        )
    rank = a.shape[0]
    alpha = rank if stored_alpha is None else stored_alpha  # diffusers' convention where a file says nothing
    if "lora_alpha" in settings:
        from peft.utils.other import get_pattern_key

        pattern = settings.get("alpha_pattern") or {}
        alpha = pattern.get(get_pattern_key(list(pattern), layer), settings["lora_alpha"])
    stabilised = bool(settings.get("use_rslora"))
    scale = float(alpha) / (math.sqrt(rank) if stabilised else rank)
    return LowRank(a.flatten(1), b.flatten(1), scale, kernel)


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
        "target_modules": sorted(layers),
    }


def _pattern(layer: str, component: str) -> str:
    """PEFT matches the end of a layer's name; `^` makes that the whole name, as diffusers writes it.

    Text encoders are called by other names in other releases of transformers, so there only the end is matched.
    """
    if component.startswith("text_encoder"):
        return re.escape(layer.removeprefix("text_model."))
    return f"^{re.escape(layer)}"


def _tidy(alpha: float) -> float | int:
    return int(alpha) if float(alpha).is_integer() else float(alpha)
