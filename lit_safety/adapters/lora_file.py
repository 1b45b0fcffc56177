"""LoRA files as low-rank factors, in and out: alpha and rank of every layer as stock diffusers and PEFT read them."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex  # type: ignore[import-untyped]
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lit_safety.adapters.lora import WEIGHTS_NAME, find_weights
from lit_safety.adapters.lora_layouts import (
    TEXT_MODEL,
    Layout,
    Place,
    Places,
    can_exist,
    refuse_keys,
    refuse_settings,
    to_one_layout,
)
from lit_safety.adapters.peft_folder import CONFIG as PEFT_CONFIG
from lit_safety.adapters.peft_folder import WEIGHTS as PEFT_WEIGHTS
from lit_safety.adapters.peft_folder import find_peft, peft_settings
from lit_safety.bounded import load_json
from lit_safety.errors import UserError
from lit_safety.weights import not_readable

#: Where diffusers keeps the LoRA configuration in a safetensors file.
METADATA_KEY = "lora_adapter_metadata"
#: Renames a whole file that is of no layout known here, as a stock pipeline does: tensors, and alphas by name.
Convert = Callable[[dict[str, Tensor]], tuple[dict[str, Tensor], dict[str, float]]]


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


def read_lora(path: str | Path, places: Places | None = None, convert: Convert | None = None) -> dict[str, LowRank]:
    """All layers of a LoRA folder or file by `{component}.{layer}` (such as `unet.mid_block...to_q`), sorted by name.

    Args:
        path: the folder or file.
        places: the layers that there are, of every component of the pipeline; None: the networks are not at hand, and
            names only have to be possible ones.
        convert: for files of which a layer has no place otherwise.

    Raises:
        UserError: the file is missing or damaged, holds numbers that are not finite, is no plain LoRA, or a layer of it
            has no place.
    """
    file, config = find_lora(path)
    tensors, metadata = _load(file)
    refuse_keys(tensors, file)
    layout = to_one_layout(tensors, file, places)
    if config is not None:
        metadata = peft_settings(layout.factors, config, file)
    if convert is None or not (layout.left or _homeless(layout.factors, places)):
        return _layers(layout, metadata, file, places)
    converted = _converted(layout, tensors, convert, file, places)
    return _layers(layout, metadata, file, places) if converted is None else converted


def _layers(layout: Layout, metadata: Mapping[str, Any], file: Path, places: Places | None) -> dict[str, LowRank]:
    """The updates, after a check that nothing is left over."""
    components = {name.split(".", 1)[0] for name in layout.factors}
    settings = {component: _settings(metadata, component) for component in components}
    for one in settings.values():
        refuse_settings(one, file)
    if layout.left or not layout.factors:
        strange = layout.left or sorted(f"{name}.alpha" for name in layout.alphas) or ["the empty file"]
        raise UserError(f"{file}: {_told(strange)} belongs to no plain LoRA; is the file complete, and a LoRA?")
    if half := sorted(name for name, pair in layout.factors.items() if len(pair) < 2):
        raise UserError(
            f"{file}: {len(half)} of {len(layout.factors)} layers have no pair of lora_A.weight and lora_B.weight: "
            f"{_told(half)}; is the file complete?"
        )
    if single := sorted(set(layout.alphas) - set(layout.factors)):
        raise UserError(f"{file}: there are alphas of layers without factors: {_told(single)}; is the file complete?")
    if homeless := _homeless(layout.factors, places):
        raise UserError(_no_place(homeless, layout, file, places))
    told = {component: _Alphas(one, file) for component, one in settings.items()}
    layers = {}
    for name, pair in sorted(layout.factors.items()):
        component, _, layer = name.partition(".")
        where = f"{file}: {name}"
        found = _layer(pair["A"], pair["B"], told[component], layer, layout.alphas.get(name), where)
        layers[name] = found if places is None else _fitting(found, places[component][layer], name, file)
    return layers


def _homeless(names: Iterable[str], places: Places | None) -> list[str]:
    """The layers that have no place, or that no network can have."""
    split = {name: tuple(name.partition(".")[::2]) for name in names}
    if places is None:
        return sorted(name for name, (component, layer) in split.items() if not can_exist(component, layer))
    return sorted(name for name, (component, layer) in split.items() if layer not in places.get(component, {}))


def _no_place(homeless: Sequence[str], layout: Layout, file: Path, places: Places | None) -> str:
    count = f"{len(homeless)} of {len(layout.factors)} layers"
    if places is None:
        return (
            f"{file}: {count} have names that no layer in a known part of a pipeline has: {_told(homeless)}; give the "
            "model it was made for (--pipeline of `merge`), or write it again with `pipe.save_lora_weights`"
        )
    return (
        f"{file} was made for another backbone: {count} have no place in this one ({', '.join(sorted(places))}): "
        f"{_told(homeless)}; load it into the model it was trained on"
    )


def _told(names: Sequence[str]) -> str:
    """The first few."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _fitting(found: LowRank, place: Place, name: str, file: Path) -> LowRank:
    """The update in the shape of its layer: a kernel of 1 x 1 is the same as none."""
    if found.shape != place.shape or (found.kernel != place.kernel and math.prod(found.kernel + place.kernel) != 1):
        kinds = [f"{kernel} kernels" if kernel else "linear" for kernel in (found.kernel, place.kernel)]
        raise UserError(
            f"{file} was made for another backbone: {name} is {found.shape[1]} -> {found.shape[0]} ({kinds[0]}), the "
            f"layer has {place.shape[1]} -> {place.shape[0]} ({kinds[1]}); load it into the model it was trained on"
        )
    return LowRank(found.a, found.b, found.scale, place.kernel)


def _converted(
    layout: Layout, tensors: Mapping[str, Tensor], convert: Convert, file: Path, places: Places | None
) -> dict[str, LowRank] | None:
    """The updates by the names that ``convert`` gives; None: it knows no better, or loses something."""
    whole = [name for name, pair in layout.factors.items() if len(pair) == 2]
    if layout.left or len(whole) < len(layout.factors):
        return None
    try:
        state, alphas = convert(dict(tensors))
        again = to_one_layout(state, file, places)
        named = {f"{name.removesuffix('.alpha')}.alpha": torch.tensor(alpha) for name, alpha in alphas.items()}
        again.alphas.update(to_one_layout(named, file, places).alphas)
    except (UserError, ValueError, LookupError, AttributeError, RuntimeError, TypeError, AssertionError):
        return None
    if len(_homeless(again.factors, places)) >= len(_homeless(layout.factors, places)):
        return None  # the file's own names say more than what came of them
    layers = _layers(again, {}, file, places)
    none = _Alphas({}, file)
    given = [_layer(pair["A"], pair["B"], none, "", layout.alphas.get(n), n) for n, pair in layout.factors.items()]
    before, after = (sum(_size(layer) for layer in some) for some in (given, layers.values()))
    # Layers may be cut or put together (q, k and v in one), but all of the update must be there.
    return layers if math.isclose(before, after, rel_tol=1e-2) else None


def _size(layer: LowRank) -> float:
    """The squared Frobenius norm of the update: tr(b'b aa')."""
    a, b = layer.a.double(), layer.b.double()
    return float(((b.T @ b) * (a @ a.T)).sum()) * layer.scale**2


def find_lora(path: str | Path) -> tuple[Path, Path | None]:
    """The weights of a LoRA folder (or the file itself), and PEFT's configuration where the folder is PEFT's.

    Raises:
        UserError: there are none, or nobody can tell which are meant.
    """
    path = Path(path)
    own = find_peft(path)
    if path.is_dir() and own is not None and (path / WEIGHTS_NAME).is_file():
        raise UserError(f"{path} holds both {own[0].name} and {WEIGHTS_NAME}: name the file that is meant")
    if own is not None:
        return own
    if path.is_dir() and not (path / WEIGHTS_NAME).is_file():
        found = sorted(path.glob("[!.]*.safetensors"))
        if len(found) == 1:
            path = found[0]
    if path.name == PEFT_WEIGHTS and path.is_file():
        raise UserError(f"{path}: there is no {PEFT_CONFIG} beside it, which says its alpha; give PEFT's whole folder")
    return find_weights(path), None


def _load(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(file, framework="pt") as handle:
            tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
            raw = (handle.metadata() or {}).get(METADATA_KEY)
        metadata = load_json(raw, finite=False) if raw else {}  # what reads a number checks it
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UserError(not_readable(file, error)) from error
    if not isinstance(metadata, dict):
        raise UserError(f"{file}: its {METADATA_KEY} is no JSON object")
    for key, tensor in tensors.items():
        try:
            finite = bool(torch.isfinite(tensor.float()).all())  # in float, which 8-bit numbers need
        except NotImplementedError as error:
            raise UserError(f"{file}: {key} is of {tensor.dtype}, which no LoRA is; train it again") from error
        if not finite:
            raise UserError(f"{file}: {key} holds numbers that are not finite; train this adapter again")
    return tensors, metadata


def _settings(metadata: Mapping[str, Any], component: str) -> dict[str, Any]:
    prefix = f"{component}."
    if "lora_alpha" in metadata:  # of a single network, as its own `save_lora_adapter` writes
        return dict(metadata)
    return {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}


def _layer(a: Tensor, b: Tensor, alphas: _Alphas, layer: str, stored_alpha: float | None, where: str) -> LowRank:
    settings = alphas.settings
    kernel = tuple(a.shape[2:])
    if not (a.is_floating_point() and b.is_floating_point()):
        raise UserError(f"{where}: factors of {a.dtype} and {b.dtype} are no floating-point numbers; write them so")
    of_a_layer = len(a.shape) in (2, 4) and len(b.shape) == len(a.shape) and a.numel() > 0 and b.numel() > 0
    if not of_a_layer or b.shape[1] != a.shape[0] or any(side != 1 for side in b.shape[2:]):
        raise UserError(
            f"{where}: factors of shape {tuple(a.shape)} and {tuple(b.shape)} are no LoRA of a linear layer or an "
            "ungrouped convolution"
        )
    rank = a.shape[0]
    alpha = rank if stored_alpha is None else stored_alpha  # diffusers' convention where a file says nothing
    if "lora_alpha" in settings or (settings and stored_alpha is None):
        alpha = alphas.of(layer, where)
        if stored_alpha is not None and not math.isclose(alpha, stored_alpha, rel_tol=1e-2):
            raise UserError(f"{where}: its alpha is {stored_alpha:g} by its tensor and {alpha:g} by its settings")
    stabilised = bool(settings.get("use_rslora"))
    scale = alpha / (math.sqrt(rank) if stabilised else rank)
    return LowRank(a.flatten(1), b.flatten(1), scale, kernel)


class _Alphas:
    """Every layer's alpha by PEFT's settings, of which `alpha_pattern` holds regular expressions: somebody else's, so
    that each has a second or a few and no more.

    Args:
        settings: a component's.
        file: for messages.
    """

    def __init__(self, settings: Mapping[str, Any], file: Path) -> None:
        self.settings = settings
        given = settings.get("alpha_pattern") or {}
        try:
            if not isinstance(given, Mapping):
                raise TypeError("alpha_pattern is no object")
            # As PEFT puts it around them.
            self.patterns = [(regex.compile(rf"(.*\.)?({pattern})$"), alpha) for pattern, alpha in given.items()]
        except (TypeError, ValueError, OverflowError, RecursionError, regex.error) as error:
            raise UserError(f"{file}: its settings tell no alpha ({error}); is the file whole?") from error

    def of(self, layer: str, where: str) -> float:
        try:
            told = (self._told(spelling) for spelling in (layer, layer.removeprefix(TEXT_MODEL)))
            found = next((alpha for alpha in told if alpha is not None), None)
            alpha = float(self.settings["lora_alpha"] if found is None else found)
        except TimeoutError as error:
            raise UserError(
                f"{where}: a pattern of its alpha_pattern takes too long; write it out by layers"
            ) from error
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{where}: its settings tell no alpha ({error}); is the file whole?") from error
        if not math.isfinite(alpha):
            raise UserError(f"{where}: its alpha is {alpha}; train this adapter again")
        return alpha

    def _told(self, layer: str) -> Any:
        return next((alpha for pattern, alpha in self.patterns if pattern.match(layer, timeout=1)), None)


def write_lora(file: Path, layers: Mapping[str, LowRank]) -> Path:
    """Write `file` as stock `load_lora_weights` reads it; layers are named `{component}.{layer}`.

    Layers of rank 0 are left out: they change nothing.

    Raises:
        UserError: no layer is left.
        OSError: the file cannot be written.
    """
    kept = {name: layers[name] for name in sorted(layers) if layers[name].rank > 0}
    if not kept:
        raise UserError(f"{file}: the adapter would change nothing, no layer has an update")
    tensors = {}
    for name, layer in kept.items():
        for side, factor in zip("AB", factors_of(layer), strict=True):
            tensors[f"{name}.lora_{side}.weight"] = factor
    metadata: dict[str, Any] = {}
    for component in sorted({name.split(".", 1)[0] for name in kept}):
        prefix = f"{component}."
        own = {name.removeprefix(prefix): layer for name, layer in kept.items() if name.startswith(prefix)}
        metadata |= {prefix + key: value for key, value in configuration(own, component).items()}
    # In two steps: a full disk is an OSError then, as for every other file.
    file.write_bytes(save(tensors, {"format": "pt", METADATA_KEY: json.dumps(metadata, indent=2, sort_keys=True)}))
    return file


def factors_of(layer: LowRank) -> tuple[Tensor, Tensor]:
    """A and B in the shapes of PEFT's layers: of a convolution A has its kernels, and B kernels of 1 x 1."""
    ones = (1,) * len(layer.kernel)
    channels = layer.shape[1] // math.prod(layer.kernel)
    a = layer.a.reshape(layer.rank, channels, *layer.kernel).contiguous()
    return a, layer.b.reshape(layer.shape[0], layer.rank, *ones).contiguous()


def configuration(layers: Mapping[str, LowRank], component: str = "unet") -> dict[str, Any]:
    """What PEFT's `LoraConfig` needs to give every layer its own rank and scale.

    Args:
        layers: by their names in the network.
        component: of a text encoder only the ends of names count, since releases of transformers differ in the rest.
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
