"""An expert: one category's LoRA as low-rank factors by layer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import nn

from lit_safety.adapters.layer_names import AdaptableLayer, AdaptableLayers, adaptable_layers
from lit_safety.adapters.lora_file import Convert, read_lora
from lit_safety.adapters.low_rank import LowRank
from lit_safety.adapters.peft_config import PEFT_CONFIG as CONFIG
from lit_safety.adapters.peft_config import read_peft_config
from lit_safety.backbones.parts import Parts
from lit_safety.backbones.pipeline_index import LIBRARIES
from lit_safety.core.errors import UserError
from lit_safety.drawing.arms import adapter_sha256


@dataclass(frozen=True)
class Expert:
    """A LoRA to merge.

    Experts are always sorted by name, so that a merge does not depend on the order of the arguments.
    """

    name: str
    layers: Mapping[str, LowRank]
    """By `{component}.{layer}`, such as `unet.mid_block.attentions.0...to_q`."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Its file or folder, for the report."""


def united_layers(experts: Sequence[Expert]) -> list[str]:
    """The sorted names of all layers that any expert adapts, after a check that the experts fit each other.

    Raises:
        UserError: two experts were made for different backbones: they adapt different parts of a pipeline, or a layer
            of the same name has different sizes.
    """
    denoisers = {e.name: {n.split(".", 1)[0] for n in e.layers if not n.startswith("text_encoder")} for e in experts}
    if len(set().union(*denoisers.values())) > 1:
        told = "; ".join(f"{name}: {', '.join(sorted(parts)) or 'none'}" for name, parts in denoisers.items())
        raise UserError(f"the experts were made for different backbones: their denoisers are called {told}")
    first: dict[str, Expert] = {}
    for expert in experts:
        for name, layer in expert.layers.items():
            other = first.setdefault(name, expert)
            known = other.layers[name]
            if (known.shape, known.kernel) != (layer.shape, layer.kernel):
                raise UserError(
                    f"the experts {other.name} and {expert.name} were made for different backbones: {name} is "
                    f"{_size(known)} in one and {_size(layer)} in the other; merge experts of one base model"
                )
    return sorted(first)


def _size(layer: LowRank) -> str:
    kernel = f" with a {' x '.join(map(str, layer.kernel))} kernel" if layer.kernel else ""
    return f"{layer.shape[1]} -> {layer.shape[0]}{kernel}"


def parts_of(experts: Sequence[Expert], layer: str) -> list[LowRank]:
    """Every expert's update of one layer; if an expert does not adapt the layer, a zero update of rank 0."""
    known = next(expert.layers[layer] for expert in experts if layer in expert.layers)
    out, inputs = known.shape
    zero = LowRank(known.a.new_zeros(0, inputs), known.b.new_zeros(out, 0), kernel=known.kernel)
    return [expert.layers.get(layer, zero) for expert in experts]


# The layers of a base model from its configuration only, so that experts can be checked without its weights.


#: The parts of a pipeline that a LoRA may adapt.
COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")


def base_layers(base: str) -> dict[str, dict[str, AdaptableLayer]] | None:
    """The layers of all parts of a pipeline that a LoRA may adapt; None: its configuration is not on this machine.

    Args:
        base: a pipeline's folder, or a hub id; of the latter only files that were fetched before are read.

    Raises:
        UserError: the folder is not a pipeline, or describes a network that this release of diffusers does not know.
    """
    folder = _at_hand(base)
    if folder is None:
        return None
    parts = Parts(str(folder))
    return {name: adaptable_layers(_network(parts, name), name) for name in COMPONENTS if parts.has(name)}


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
    """The network on the meta device: its weights take no memory."""
    library, class_name = parts.index.components[name]
    found: Any = getattr(import_module(library), class_name, None) if library in LIBRARIES else None
    if found is None:
        raise UserError(f"the pipeline {parts.source} does not load: its {name} is {library}.{class_name}")
    config = parts.config(name)
    try:
        with torch.device("meta"):
            if library == "diffusers":
                made: nn.Module = found.from_config(config)
            else:
                made = found(found.config_class.from_dict(config))
            return made
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"the pipeline {parts.source} does not load: {name}/config.json: {first_line}") from error


# Reading the experts that a command line names.


MOST_OF_A_CARD = 1 << 18
"""The front matter must end within this many bytes of a model card."""


def read_experts(given: Sequence[str], base: str | None = None) -> list[Expert]:
    """Experts in the given order; each is FOLDER, FILE or NAME=FOLDER.

    Args:
        given: the experts.
        base: the model that they were made for; None: the one that each one's card names. If its configuration is on
            this machine, every layer of an expert must be one of its layers; else the names must be possible ones.

    Raises:
        UserError: no expert is given, one is given twice or cannot be read, two have the same name, or an expert adapts
            a layer that is not in the base model.
    """
    if not given:
        raise UserError("no experts: give at least one folder with a LoRA, `merge FOLDER FOLDER ... --out FOLDER`")
    named = [_split(one) for one in given]
    paths = [path.resolve() for _, path in named]
    for path in paths:
        if paths.count(path) > 1:
            raise UserError(f"{path} is given twice; give it once, with a larger --weights if it should count more")
    short = iter(short_names([path for name, path in named if name is None]))
    names = [next(short) if name is None else name for name, _ in named]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two experts are called {name}; name them NAME=FOLDER")
    layers = cache(base_layers)  # most experts have the same base model
    return [_read(name, path, base, layers) for name, (_, path) in zip(names, named, strict=True)]


def _read(name: str, path: Path, base: str | None, layers: Callable[[str], AdaptableLayers | None]) -> Expert:
    own = base_model(path)
    known = base if base is not None else own
    there = None if known is None else layers(known)
    convert = None if known is None or there is None or "unet" in there else _converter(known)
    found = read_lora(path, there, convert)
    return Expert(name, found, {"path": str(path), "sha256": adapter_sha256(path), "base_model": own})


def _converter(base: str) -> Convert | None:
    """The base pipeline's own conversion of other programs' layer names; None for UNets, whose names we know."""
    import diffusers

    from lit_safety.adapters.load_lora import converter

    folder = _at_hand(base)
    kind = getattr(diffusers, Parts(str(folder)).index.class_name, None)
    return converter(kind) if hasattr(kind, "lora_state_dict") else None


def _split(given: str) -> tuple[str | None, Path]:
    name, equals, path = given.partition("=")
    if equals and name and path and not Path(given).exists():
        return name, Path(path)
    return None, Path(given)


def short_names(paths: Sequence[PurePath]) -> list[str]:
    """Short names for paths: the fewest last parts that differ for all paths, without a common end.

    So `a/violence/adapter` and `a/hate/adapter` become `violence` and `hate`.
    """
    if len(paths) == 1:
        return [paths[0].stem if paths[0].suffix == ".safetensors" else paths[0].name or str(paths[0])]
    parts = [path.parts for path in paths]
    shortest = min((len(p) for p in parts), default=0)
    common = next((n for n in range(shortest) if len({p[len(p) - 1 - n] for p in parts}) > 1), 0)
    trimmed = [p[: len(p) - common] for p in parts]
    for length in range(1, max((len(p) for p in trimmed), default=0) + 1):
        tails = ["/".join(p[-length:]) for p in trimmed]
        if len(set(tails)) == len(tails):
            return [tail.removesuffix(".safetensors") for tail in tails]
    return [str(path) for path in paths]


def base_model(path: Path) -> str | None:
    """The base model that an adapter's model card names, or else its PEFT configuration; None: neither names one.

    Raises:
        UserError: PEFT's configuration exists but cannot be read.
    """
    folder = path if path.is_dir() else path.parent
    return _of_card(folder / "README.md") or _of_peft(folder / CONFIG)


def _of_card(file: Path) -> str | None:
    """The front matter's `base_model`; None if it is a list. It is read line by line: a card can contain anything."""
    try:
        with file.open("rb") as stream:
            lines = stream.read(MOST_OF_A_CARD).decode("utf-8", errors="replace").splitlines()
    except OSError:
        return None
    if not lines or lines[0].rstrip() != "---" or "---" not in (ends := [line.rstrip() for line in lines[1:]]):
        return None
    for line in ends[: ends.index("---")]:
        key, colon, value = line.partition(":")
        if key == "base_model" and colon and value.strip():
            return _unquoted(value.strip()) or None
    return None


def _unquoted(value: str) -> str:
    """A value of the front matter without quotes, which our own cards use around unusual characters."""
    try:
        read = json.loads(value) if value.startswith('"') else value
    except ValueError:
        read = value
    return read if isinstance(read, str) and read is not value else value.strip(" \t'\"")


def _of_peft(file: Path) -> str | None:
    named = read_peft_config(file).get("base_model_name_or_path") if file.is_file() else None
    return named if isinstance(named, str) and named else None
