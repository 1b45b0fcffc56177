"""Files of user adapters: our own format, and reading of any layout into a UNet.

Ours is `user_adapter.safetensors`: `projection.*` (weights, null user, statistics), by diffusers' layer names
`layers.{layer}.to_k_user.weight` and `.to_v_user.weight`, and a JSON object in the metadata. The published layout is in
`psa_published.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lit_safety.adapters.lora import WEIGHTS_NAME as LORA_NAME
from lit_safety.adapters.psa_published import from_published, is_published
from lit_safety.adapters.psa_tensors import read_tensors
from lit_safety.adapters.user_adapter import UserAdapter, cross_attentions
from lit_safety.data.atomic import write_atomic
from lit_safety.errors import UserError

WEIGHTS_NAME = "user_adapter.safetensors"
#: What a folder may hold, the first found wins: ours, then the published ones.
FILE_NAMES = (WEIGHTS_NAME, "psa_adapter.safetensors", "psa_adapter.bin")
METADATA_KEY = "lit_safety_user_adapter"
FORMAT_VERSION = 1
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def save_user_adapter(adapter: UserAdapter, folder: Path, base_model: str) -> Path:
    """Write `folder/user_adapter.safetensors`: all of the adapter, whole or not at all.

    Raises:
        UserError: a weight is not finite or empty (as under ZeRO 3, when it was not gathered), or the disk is full.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _state(adapter).items()}
    for name, tensor in tensors.items():
        if tensor.numel() == 0 or not torch.isfinite(tensor).all():
            raise UserError(f"{name} is empty or holds numbers that are not finite: nothing was written")
    projection = adapter.projection
    about = {
        "format_version": FORMAT_VERSION,
        "base_model": base_model,
        "tokens": projection.tokens,
        "embedding_dim": projection.embedding_dim,
        "context_dim": projection.context_dim,
    }
    metadata = {"format": "pt", METADATA_KEY: json.dumps(about, sort_keys=True)}
    return write_atomic(folder / WEIGHTS_NAME, save(tensors, metadata))


def find_user_adapter(path: str | Path) -> Path:
    """The weights in a folder (or the file itself).

    Raises:
        UserError: there are none.
    """
    path = Path(path)
    for file in [path / name for name in FILE_NAMES] if path.is_dir() else [path]:
        if file.is_file():
            return file
    raise UserError(f"no user adapter at {path}: expected a folder with one of {', '.join(FILE_NAMES)}, or such a file")


def is_user_adapter(path: str | Path) -> bool:
    """Whether a folder or file holds user attention, of our format or a published one; False where there is nothing.

    Raises:
        UserError: a folder holds a LoRA beside it, so that nobody can tell which is meant.
    """
    path = Path(path)
    if path.is_dir():
        found = [name for name in FILE_NAMES if (path / name).is_file()]
        if found and (path / LORA_NAME).is_file():
            raise UserError(f"{path} holds both {found[0]} and {LORA_NAME}: name the file that is meant")
        return bool(found)
    if path.name in FILE_NAMES:
        return path.is_file()
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as handle:
            return METADATA_KEY in (handle.metadata() or {}) or is_published(dict.fromkeys(handle.keys()))
    except (SafetensorError, OSError, ValueError):
        return False  # whoever loads it says what is wrong with it


def load_user_adapter(unet: Any, path: str | Path) -> UserAdapter:
    """Attach user attention to `unet` with the weights of a folder or file, of our format or a published one.

    Raises:
        UserError: the file is missing, damaged or hostile; a layer is missing, superfluous or of another shape; it was
            made for another backbone.
    """
    tensors, embedding_dim, tokens = _read(unet, path)
    adapter = UserAdapter.attach(unet, embedding_dim, tokens)
    _copy(adapter, tensors)
    return adapter


def fill_user_adapter(adapter: UserAdapter, path: str | Path) -> None:
    """Put the weights of a folder or file, statistics of users included, into user attention that is there.

    Raises:
        UserError: as `load_user_adapter`, or it has other tokens, or is for other embeddings.
    """
    tensors, embedding_dim, tokens = _read(adapter.unet, path)
    projection = adapter.projection
    if (embedding_dim, tokens) != (projection.embedding_dim, projection.tokens):
        raise UserError(
            f"{path} has {tokens} user tokens for embeddings of {embedding_dim} numbers, and here are "
            f"{projection.tokens} for {projection.embedding_dim}"
        )
    _copy(adapter, tensors)


def _copy(adapter: UserAdapter, tensors: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in _state(adapter).items():
            tensor.copy_(tensors[name])


def _read(unet: Any, path: str | Path) -> tuple[dict[str, Tensor], int, int]:
    """Checked tensors by our names, the embedding's width and the number of tokens."""
    file = find_user_adapter(path)
    layers = {name: tuple(attn.to_k.weight.shape) for name, attn in cross_attentions(unet).items()}
    tensors, metadata = read_tensors(file, layers)
    if is_published(tensors):
        tensors, tokens = from_published(tensors, layers, file), 1
    else:
        tokens = _read_about(metadata, layers, file)["tokens"]
    embedding_dim = _embedding_dim(tensors, file)
    _check(tensors, _expected(layers, embedding_dim, tokens), file)
    return tensors, embedding_dim, tokens


def _state(adapter: UserAdapter) -> dict[str, Tensor]:
    """The adapter's own tensors by their names in the file."""
    state = {f"projection.{name}": tensor for name, tensor in adapter.projection.state_dict().items()}
    for layer, attention in adapter.layers.items():
        state |= {f"layers.{layer}.{name}": tensor for name, tensor in attention.state_dict().items()}
    return state


def _expected(layers: Mapping[str, tuple[int, ...]], embedding_dim: int, tokens: int) -> dict[str, tuple[int, ...]]:
    context_dim = next(iter(layers.values()))[1]
    # Layers first: their names say most in a message.
    expected = {
        f"layers.{layer}.{side}.weight": shape for layer, shape in layers.items() for side in ("to_k_user", "to_v_user")
    }
    return expected | {
        "projection.linear.weight": (tokens * context_dim, embedding_dim),
        "projection.linear.bias": (tokens * context_dim,),
        "projection.norm.weight": (context_dim,),
        "projection.norm.bias": (context_dim,),
        "projection.null_tokens": (tokens, context_dim),
        "projection.mean": (embedding_dim,),
        "projection.std": (embedding_dim,),
    }


def _check(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], file: Path) -> None:
    for name, shape in expected.items():
        if name not in tensors:
            raise UserError(f"{file}: {name} is missing; is the file complete, and made for this backbone?")
        if tuple(tensors[name].shape) != shape:
            raise UserError(
                f"{file} was made for another backbone: {name} has shape {tuple(tensors[name].shape)}, this model's "
                f"layer {shape}"
            )
        if tensors[name].dtype not in _DTYPES or not torch.isfinite(tensors[name]).all():
            raise UserError(f"{file}: {name} holds numbers that are not finite, or no floating-point numbers")
    unknown = sorted(set(tensors) - set(expected))
    if unknown:
        raise UserError(f"{file} was made for another backbone: this model has no {unknown[0]}")
    if not (tensors["projection.std"] > 0).all():
        raise UserError(f"{file}: projection.std holds numbers that are not above 0")


def _embedding_dim(tensors: Mapping[str, Tensor], file: Path) -> int:
    weight = tensors.get("projection.linear.weight")
    if weight is None or weight.ndim != 2 or weight.shape[1] == 0:
        raise UserError(f"{file}: the weight of the user projection is missing or no matrix")
    return weight.shape[1]


def _read_about(metadata: Mapping[str, str], layers: Mapping[str, tuple[int, ...]], file: Path) -> dict[str, Any]:
    try:
        about = json.loads(metadata.get(METADATA_KEY, ""))
    except ValueError as error:
        raise UserError(
            f"{file} is no user adapter: it has neither our metadata ({METADATA_KEY}) nor the published keys"
        ) from error
    version = about.get("format_version") if isinstance(about, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(f"{file}: format version {version!r} is not known here (this release reads {FORMAT_VERSION})")
    numbers = [about.get(key) for key in ("tokens", "embedding_dim", "context_dim")]
    if not all(type(number) is int and number > 0 for number in numbers):
        raise UserError(f"{file}: tokens, embedding_dim and context_dim in its metadata must be whole numbers above 0")
    width = next(iter(layers.values()))[1]
    if about["context_dim"] != width:
        raise UserError(
            f"{file} was made for another backbone ({about.get('base_model')}): its context is "
            f"{about['context_dim']} wide, this model's {width}"
        )
    return about
