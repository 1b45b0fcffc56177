"""Read the experts that a command line names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path, PurePath

from lit_safety.adapters.lora_file import read_lora
from lit_safety.adapters.lora_layouts import Places
from lit_safety.adapters.peft_folder import CONFIG, read_peft_config
from lit_safety.errors import UserError
from lit_safety.evaluation.arms import adapter_sha256
from lit_safety.merging.base_layers import base_layers
from lit_safety.merging.expert import Expert

MOST_OF_A_CARD = 1 << 18
"""Bytes of a model card in which its front matter ends."""


def read_experts(given: Sequence[str], base: str | None = None) -> list[Expert]:
    """Experts in the order given; each is FOLDER, FILE or NAME=FOLDER.

    Args:
        given: the experts.
        base: the model that they were made for; None: the one that each one's card names. Where its configuration is on
            this machine, every layer of an expert must be one of its layers; else the names must be possible ones.

    Raises:
        UserError: there is none, one is given twice or cannot be read, two share a name, or a layer of one has no place
            in the base model.
    """
    if not given:
        raise UserError("no experts: give at least one folder with a LoRA, `merge FOLDER FOLDER ... --out FOLDER`")
    named = [_split(one) for one in given]
    places = [path.resolve() for _, path in named]
    for place in places:
        if places.count(place) > 1:
            raise UserError(f"{place} is given twice; give it once, with --weights if it is to count more")
    short = iter(short_names([path for name, path in named if name is None]))
    names = [next(short) if name is None else name for name, _ in named]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two experts are called {name}; name them NAME=FOLDER")
    layers = cache(base_layers)  # mostly of one model
    return [_read(name, path, base, layers) for name, (_, path) in zip(names, named, strict=True)]


def _read(name: str, path: Path, base: str | None, layers: Callable[[str], Places | None]) -> Expert:
    own = base_model(path)
    known = base if base is not None else own
    found = read_lora(path, None if known is None else layers(known))
    return Expert(name, found, {"path": str(path), "sha256": adapter_sha256(path), "base_model": own})


def _split(given: str) -> tuple[str | None, Path]:
    name, equals, path = given.partition("=")
    if equals and name and path and not Path(given).exists():
        return name, Path(path)
    return None, Path(given)


def short_names(paths: Sequence[PurePath]) -> list[str]:
    """As few of each path's last parts as tell them all apart: `a/violence/adapter` beside `a/hate/adapter` is
    `violence/adapter`, and what all have in common at the end is left out: `violence`."""
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
    """The base model that the model card beside an adapter names, or else PEFT's configuration; None: neither does.

    Raises:
        UserError: there is a configuration of PEFT's that cannot be read.
    """
    folder = path if path.is_dir() else path.parent
    return _of_card(folder / "README.md") or _of_peft(folder / CONFIG)


def _of_card(file: Path) -> str | None:
    """The front matter's `base_model`; of a list of them none is named. Read line by line: a card may hold anything."""
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
            return value.strip(" \t'\"") or None
    return None


def _of_peft(file: Path) -> str | None:
    named = read_peft_config(file).get("base_model_name_or_path") if file.is_file() else None
    return named if isinstance(named, str) and named else None
