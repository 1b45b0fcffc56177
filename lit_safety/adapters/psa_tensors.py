"""Tensors out of adapter files that somebody else made: no code in them is run, and sizes are bounded first."""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lit_safety.errors import UserError
from lit_safety.weights import not_readable

#: No text model has embeddings this long.
LARGEST_EMBEDDING = 65_536
#: Bytes of a torch file beside its numbers: names and shapes.
LARGEST_INDEX = 1 << 20
#: What torch's restricted unpickler raises on damaged or hostile files.
_LOAD_ERRORS = (
    RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError, AssertionError, EOFError, OverflowError,
    MemoryError, RecursionError, struct.error, pickle.UnpicklingError, zipfile.BadZipFile, OSError,
)  # fmt: skip


def read_tensors(file: Path, layers: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a `.safetensors` file, or of a `.bin` file as torch writes it, and the metadata.

    Nested names of a torch file are joined by dots: `psa_adapter.0.to_k_user.0.weight`.

    Args:
        file: what to read.
        layers: shapes (hidden, d_ctx) of the model's layers; they bound how large a torch file may become.

    Raises:
        UserError: the file is damaged, too large, or holds anything else than tensors in dictionaries.
    """
    if file.suffix == ".safetensors":
        return _read_safetensors(file)
    if file.suffix == ".bin":
        return _flatten(_read_torch(file, layers), file), {}
    raise UserError(f"{file}: user adapters are read from .safetensors and .bin files")


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(file, framework="pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
            return tensors, dict(handle.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(not_readable(file, error)) from error


def _read_torch(file: Path, layers: Mapping[str, tuple[int, ...]]) -> Any:
    context_dim = next(iter(layers.values()))[1]
    numbers = sum(2 * hidden * width for hidden, width in layers.values()) + context_dim * (LARGEST_EMBEDDING + 3)
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise UserError(f"{file} is no torch file in the zip format: {error}; save it again with torch.save") from error
    # What torch would unpack, compressed records included.
    size = sum(member.file_size for member in members)
    index = sum(member.file_size for member in members if "/data/" not in member.filename)
    if size > 8 * numbers + LARGEST_INDEX or index > LARGEST_INDEX:
        raise UserError(f"{file} would unpack to {size} bytes, more than any adapter of this backbone: not read")
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except _LOAD_ERRORS as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{file} is no plain file of weights: {first_line[:200]}") from error


def _flatten(loaded: Any, file: Path) -> dict[str, Tensor]:
    if not isinstance(loaded, dict) or not all(isinstance(part, dict) for part in loaded.values()):
        raise UserError(f"{file}: expected dictionaries of tensors, such as psa_adapter and user_proj")
    tensors = {}
    for part, entries in loaded.items():
        for name, tensor in entries.items():
            plain = isinstance(tensor, Tensor) and tensor.layout is torch.strided and tensor.device.type == "cpu"
            if not plain or not tensor.is_floating_point():
                raise UserError(f"{file}: {part}.{name} is no plain tensor of numbers")
            tensors[f"{part}.{name}"] = tensor.detach()
    return tensors
