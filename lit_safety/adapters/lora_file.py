"""LoRA files in and out: alpha and rank of every layer as stock diffusers and PEFT read them.

It reads diffusers' own files (new and old), PEFT's adapter folders, kohya-style files, and files with the prefixes that
other tools write. A file is read whole or refused. Updates that are not plain low-rank products are refused by name: a
sum of them would be wrong without an error.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lit_safety.adapters.layer_names import AdaptableLayer, AdaptableLayers, Layout, can_exist, to_one_layout
from lit_safety.adapters.lora import WEIGHTS_NAME, find_weights
from lit_safety.adapters.low_rank import LowRank, factors_of, squared_norm
from lit_safety.adapters.peft_config import PEFT_CONFIG, PEFT_WEIGHTS, Alphas, configuration, find_peft, peft_settings
from lit_safety.core.errors import UserError
from lit_safety.core.text import load_json
from lit_safety.core.weights import not_readable

#: Parts of keys that show that an update is not a plain low-rank product -> its name; `$` is the key's end.
REFUSED_KEYS = {
    "lora_magnitude_vector": "DoRA: its update also rescales the base model's own weights",
    "dora_scale": "DoRA: its update also rescales the base model's own weights",
    "lora_B.bias": "a LoRA with bias (lora_bias)",
    "lora_up.bias": "a LoRA with bias (lora_bias)",
    "lora_mid": "LoCon with a Tucker core",
    "hada_w": "LoHa",
    "lokr_": "LoKr",
    "lora_embedding": "a LoRA on an embedding",
    "lora_diag": "KaSA: it also cuts the base model's own weights",
    ".diff$": "a file of whole weight differences",
    ".diff_b$": "a file of whole weight differences",
}
#: The same by a setting in the file's metadata: a true value is refused.
REFUSED_SETTINGS = {
    "use_dora": "DoRA: its update also rescales the base model's own weights",
    "lora_bias": "a LoRA with bias (lora_bias)",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "kasa_config": "KaSA: it also cuts the base model's own weights",
    "monteclora_config": "MonteCLoRA: its update is drawn again at every pass",
    "arrow_config": "Arrow: it chooses among adapters for every token",
    "alora_invocation_tokens": "aLoRA: it is active only for some tokens",
    "target_parameters": "a LoRA on bare parameters (target_parameters)",
    "trainable_token_indices": "an adapter with new embeddings in it (trainable_token_indices)",
    "layer_replication": "a LoRA on replicated layers",
    "modules_to_save": "an adapter with whole layers in it (modules_to_save)",
}
#: These start from a changed base model, so that their factors alone are not the update.
REFUSED_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")

#: Those that stock diffusers can load into a pipeline.
_STOCK = ("lora_magnitude_vector", "use_dora", "lora_B.bias", "lora_bias", "lokr_")
_ADVICE = "only plain LoRA files are read (fuse this one into a pipeline instead)"


class NotPlain(UserError):
    """An adapter whose update is not a plain low-rank product.

    Args:
        message: says so.
        what: the key or setting that shows it.
    """

    def __init__(self, message: str, what: str = "") -> None:
        super().__init__(message)
        self.stock = any(mark in what for mark in _STOCK)
        """Whether stock diffusers may be able to load it."""


def refuse_keys(keys: Iterable[str], file: Path) -> None:
    """Refuse the first key that does not belong to a plain LoRA.

    Raises:
        NotPlain: there is one.
    """
    for key in keys:
        for mark, name in REFUSED_KEYS.items():
            if mark in f"{key}$":
                raise NotPlain(f"{file}: {key} belongs to {name}; {_ADVICE}", key)


def refuse_settings(settings: Mapping[str, Any], file: Path) -> None:
    """Refuse the first setting of a PEFT configuration that shows that it is not a plain LoRA.

    Raises:
        NotPlain: there is one.
    """
    for setting, name in REFUSED_SETTINGS.items():
        if settings.get(setting):
            raise NotPlain(f"{file}: {setting} is set, so it is {name}; {_ADVICE}", setting)
    if settings.get("bias", "none") != "none":
        raise NotPlain(f"{file}: bias is {settings['bias']!r}, so the base model's biases were trained too; {_ADVICE}")
    init = str(settings.get("init_lora_weights", "")).lower()
    if init.startswith(REFUSED_INITS):
        raise NotPlain(f"{file}: init_lora_weights is {init!r}, which also changes the base model; {_ADVICE}")


#: Where diffusers keeps the LoRA configuration in a safetensors file.
METADATA_KEY = "lora_adapter_metadata"
#: Renames a whole file with an unknown layout, as a stock pipeline does: tensors, and alphas by name.
Convert = Callable[[dict[str, Tensor]], tuple[dict[str, Tensor], dict[str, float]]]
#: A UNet's convolutions, and those whose kernels are larger than 1 x 1 in every UNet.
_CONVOLUTION = re.compile(r"(?:^|\.)(?:conv\w*|proj_in|proj_out)$")
_SPATIAL = re.compile(r"resnets\.\d+\.conv[12]$|samplers\.\d+\.conv$")


def read_lora(
    path: str | Path, known: AdaptableLayers | None = None, convert: Convert | None = None
) -> dict[str, LowRank]:
    """All layers of a LoRA folder or file by `{component}.{layer}` (such as `unet.mid_block...to_q`), sorted by name.

    Args:
        path: the folder or file.
        known: the layers of every component of the pipeline; None: the networks are not loaded, and names must only be
            possible ones.
        convert: for files with a layer that is not found otherwise.

    Raises:
        UserError: the file is missing or damaged, holds numbers that are not finite, is not a plain LoRA, or holds a
            layer that does not exist.
    """
    file, config = find_lora(path)
    tensors, metadata = _load(file)
    refuse_keys(tensors, file)
    layout = to_one_layout(tensors, file, known)
    if config is not None:
        metadata = peft_settings(layout.factors, config, file)
    if convert is None or not (layout.left or _homeless(layout.factors, known)):
        return _layers(layout, metadata, file, known)
    converted = _converted(layout, tensors, convert, file, known)
    return _layers(layout, metadata, file, known) if converted is None else converted


def _layers(
    layout: Layout, metadata: Mapping[str, Any], file: Path, known: AdaptableLayers | None
) -> dict[str, LowRank]:
    """The updates, after a check that all tensors are used."""
    components = {name.split(".", 1)[0] for name in layout.factors}
    settings = {component: _settings(metadata, component) for component in components}
    for one in settings.values():
        refuse_settings(one, file)
    if layout.left or not layout.factors:
        strange = layout.left or sorted(f"{name}.alpha" for name in layout.alphas) or ["the empty file"]
        raise UserError(f"{file}: {_told(strange)} does not belong to a plain LoRA; is the file complete, and a LoRA?")
    if half := sorted(name for name, pair in layout.factors.items() if len(pair) < 2):
        raise UserError(
            f"{file}: {len(half)} of {len(layout.factors)} layers lack lora_A.weight or lora_B.weight: "
            f"{_told(half)}; is the file complete?"
        )
    if single := sorted(set(layout.alphas) - set(layout.factors)):
        raise UserError(f"{file}: there are alphas of layers without factors: {_told(single)}; is the file complete?")
    if homeless := _homeless(layout.factors, known):
        raise UserError(_no_place(homeless, layout, file, known))
    told = {component: Alphas(one, file) for component, one in settings.items()}
    layers = {}
    for name, pair in sorted(layout.factors.items()):
        component, _, layer = name.partition(".")
        where = f"{file}: {name}"
        found = _layer(pair["A"], pair["B"], told[component], layer, layout.alphas.get(name), where)
        if known is None:
            _check_shape(found, component, layer, where)
        layers[name] = found if known is None else _fitting(found, known[component][layer], name, file)
    return layers


def _check_shape(found: LowRank, component: str, layer: str, where: str) -> None:
    """Check that an update can belong to its layer, without the network.

    Raises:
        UserError: its factors are transposed, or it is for a convolution and the layer is linear, or the reverse.
    """
    if found.rank > max(found.shape):
        raise UserError(
            f"{where}: has rank {found.rank} and is {found.shape[1]} -> {found.shape[0]}: its factors are transposed; "
            "give lora_A.weight as (rank, in) and lora_B.weight as (out, rank)"
        )
    pixels = math.prod(found.kernel)
    if component == "unet" and (_SPATIAL.search(layer) if pixels == 1 else not _CONVOLUTION.search(layer)):
        kind = f"a convolution of {found.kernel} kernels" if found.kernel else "linear"
        raise UserError(
            f"{where}: its update is {kind}, but a UNet's layer of this name is not; train this adapter again"
        )


def _homeless(names: Iterable[str], known: AdaptableLayers | None) -> list[str]:
    """The layers that are not in the network; without a network, those that do not exist in any network."""
    split = {name: tuple(name.partition(".")[::2]) for name in names}
    if known is None:
        return sorted(name for name, (component, layer) in split.items() if not can_exist(component, layer))
    return sorted(name for name, (component, layer) in split.items() if layer not in known.get(component, {}))


def _no_place(homeless: Sequence[str], layout: Layout, file: Path, known: AdaptableLayers | None) -> str:
    count = f"{len(homeless)} of {len(layout.factors)} layers"
    if known is None:
        return (
            f"{file}: {count} have names that are not layers of a known part of a pipeline: {_told(homeless)}; give "
            "the model it was made for (--pipeline of `merge`), or write it again with `pipe.save_lora_weights`"
        )
    return (
        f"{file} was made for another backbone: {count} do not exist in this one ({', '.join(sorted(known))}): "
        f"{_told(homeless)}; load it into the model it was trained on"
    )


def _told(names: Sequence[str]) -> str:
    """The first few."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _fitting(found: LowRank, layer: AdaptableLayer, name: str, file: Path) -> LowRank:
    """The update in the shape of its layer; a kernel of 1 x 1 is the same as a linear layer."""
    if found.shape != layer.shape or (found.kernel != layer.kernel and math.prod(found.kernel + layer.kernel) != 1):
        kinds = [f"{kernel} kernels" if kernel else "linear" for kernel in (found.kernel, layer.kernel)]
        raise UserError(
            f"{file} was made for another backbone: {name} is {found.shape[1]} -> {found.shape[0]} ({kinds[0]}), the "
            f"layer has {layer.shape[1]} -> {layer.shape[0]} ({kinds[1]}); load it into the model it was trained on"
        )
    return LowRank(found.a, found.b, found.scale, layer.kernel)


def _converted(
    layout: Layout, tensors: Mapping[str, Tensor], convert: Convert, file: Path, known: AdaptableLayers | None
) -> dict[str, LowRank] | None:
    """The updates by the names that ``convert`` gives; None: it does not find more layers, or a part is lost."""
    whole = [name for name, pair in layout.factors.items() if len(pair) == 2]
    if layout.left or len(whole) < len(layout.factors):
        return None
    try:
        # Copies: diffusers writes alphas into the tensors that it is given.
        state, alphas = convert({key: tensor.clone() for key, tensor in tensors.items()})
        again = to_one_layout(state, file, known)
        named = {f"{name.removesuffix('.alpha')}.alpha": torch.tensor(alpha) for name, alpha in alphas.items()}
        again.alphas.update(to_one_layout(named, file, known).alphas)
    except (UserError, ValueError, LookupError, AttributeError, RuntimeError, TypeError, AssertionError):
        return None
    if not again.factors or len(_homeless(again.factors, known)) >= len(_homeless(layout.factors, known)):
        return None  # it did not help: the message should show the file's own names
    layers = _layers(again, {}, file, known)
    none = Alphas({}, file)
    given = [_layer(pair["A"], pair["B"], none, "", layout.alphas.get(n), n) for n, pair in layout.factors.items()]
    before, after = (sum(squared_norm(layer) for layer in some) for some in (given, layers.values()))
    # Layers may be split or joined (q, k and v in one), but the whole update must be there.
    return layers if math.isclose(before, after, rel_tol=1e-2) else None


def find_lora(path: str | Path) -> tuple[Path, Path | None]:
    """The weights of a LoRA folder (or the file itself), and PEFT's configuration if the folder is PEFT's.

    Raises:
        UserError: there are none, or it is not clear which are meant.
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
        raise UserError(f"{path}: there is no {PEFT_CONFIG} next to it, which says its alpha; give PEFT's whole folder")
    return find_weights(path), None


def _load(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(file, framework="pt") as handle:
            tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
            raw = (handle.metadata() or {}).get(METADATA_KEY)
        metadata = load_json(raw, finite=False) if raw else {}  # numbers are checked where they are used
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UserError(not_readable(file, error)) from error
    if not isinstance(metadata, dict):
        raise UserError(f"{file}: its {METADATA_KEY} is not a JSON object")
    for key, tensor in tensors.items():
        try:
            finite = bool(torch.isfinite(tensor.float()).all())  # 8-bit numbers must be converted first
        except NotImplementedError as error:
            raise UserError(
                f"{file}: {key} is of {tensor.dtype}, which is not a type for a LoRA; train it again"
            ) from error
        if not finite:
            raise UserError(f"{file}: {key} holds numbers that are not finite; train this adapter again")
    return tensors, metadata


def _settings(metadata: Mapping[str, Any], component: str) -> dict[str, Any]:
    prefix = f"{component}."
    if "lora_alpha" in metadata:  # the file of a single network, as its own `save_lora_adapter` writes it
        return dict(metadata)
    return {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}


def _layer(a: Tensor, b: Tensor, alphas: Alphas, layer: str, stored_alpha: float | None, where: str) -> LowRank:
    settings = alphas.settings
    kernel = tuple(a.shape[2:])
    if not (a.is_floating_point() and b.is_floating_point()):
        raise UserError(f"{where}: factors of {a.dtype} and {b.dtype} are not floating-point numbers; convert them")
    of_a_layer = len(a.shape) in (2, 4) and len(b.shape) == len(a.shape) and a.numel() > 0 and b.numel() > 0
    if not of_a_layer or b.shape[1] != a.shape[0] or any(side != 1 for side in b.shape[2:]):
        raise UserError(
            f"{where}: factors of shape {tuple(a.shape)} and {tuple(b.shape)} are not a LoRA of a linear layer or an "
            "ungrouped convolution"
        )
    rank = a.shape[0]
    alpha = rank if stored_alpha is None else stored_alpha  # diffusers' convention if a file does not state it
    if "lora_alpha" in settings or (settings and stored_alpha is None):
        alpha = alphas.of(layer, where)
        if stored_alpha is not None and not math.isclose(alpha, stored_alpha, rel_tol=1e-2):
            raise UserError(f"{where}: its alpha is {stored_alpha:g} in its tensor and {alpha:g} in its settings")
    stabilised = bool(settings.get("use_rslora"))
    scale = alpha / (math.sqrt(rank) if stabilised else rank)
    return LowRank(a.flatten(1), b.flatten(1), scale, kernel)


def write_lora(file: Path, layers: Mapping[str, LowRank]) -> Path:
    """Write `file` as stock `load_lora_weights` reads it; layers are named `{component}.{layer}`.

    Layers of rank 0 are left out, because they have no effect.

    Raises:
        UserError: no layer is left.
        OSError: the file cannot be written.
    """
    kept = {name: layers[name] for name in sorted(layers) if layers[name].rank > 0}
    if not kept:
        raise UserError(f"{file}: the adapter would have no effect: all its layers have rank 0")
    tensors = {}
    for name, layer in kept.items():
        for side, factor in zip("AB", factors_of(layer), strict=True):
            tensors[f"{name}.lora_{side}.weight"] = factor.clone()  # q, k and v of one layer may share a factor
    metadata: dict[str, Any] = {}
    for component in sorted({name.split(".", 1)[0] for name in kept}):
        prefix = f"{component}."
        own = {name.removeprefix(prefix): layer for name, layer in kept.items() if name.startswith(prefix)}
        metadata |= {prefix + key: value for key, value in configuration(own, component).items()}
    # In two steps, so that a full disk is an OSError, as for every other file.
    file.write_bytes(save(tensors, {"format": "pt", METADATA_KEY: json.dumps(metadata, indent=2, sort_keys=True)}))
    return file
