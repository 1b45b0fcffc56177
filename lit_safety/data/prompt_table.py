"""`prompts.safetensors`: the text encoders' outputs of every prompt of a cached set, by the text's hash.

One row a prompt: `hashes` uint8 (P, 16), sorted, and for each output a tensor (P, ...). The empty prompt is always
among them. Rows are read from disk one by one, so memory is 16 bytes a prompt however long the rows are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lit_safety.data.remote import default_cache, fetch, is_remote
from lit_safety.errors import UserError
from lit_safety.hashes import check_regular

HASHES = "hashes"
HASH_BYTES = 16
_TYPES = {"F16": "float16", "F32": "float32"}


def text_hash(prompt: str) -> bytes:
    """16 bytes that stand for a prompt."""
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).digest()[:HASH_BYTES]


class PromptTable:
    """Reads rows of a `prompts.safetensors`.

    Args:
        path: the file.

    Raises:
        UserError: it is missing, damaged, not of this layout, or lacks the empty prompt.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        try:
            check_regular(self.path)
            self._file: Any = safe_open(self.path, framework="pt").__enter__()
            self.names = sorted(set(self._file.keys()) - {HASHES})
            hashes = self._file.get_tensor(HASHES)
            self.metadata: dict[str, str] = dict(self._file.metadata() or {})
            slices = {name: self._file.get_slice(name) for name in self.names}
            kinds = {name: (one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.path}: is no readable cache of prompts ({error}); make the cache anew") from error
        rows = len(hashes) if hashes.ndim else 0
        wrong = [n for n, (kind, shape) in kinds.items() if kind not in _TYPES or len(shape) < 2 or shape[0] != rows]
        if hashes.dtype is not torch.uint8 or tuple(hashes.shape) != (rows, HASH_BYTES) or wrong or not self.names:
            raise UserError(f"{self.path}: is no cache of prompts: {wrong or HASHES} of another type or shape")
        self.hashes = as_words(hashes.numpy())
        if rows > 1 and not (self.hashes[:-1] < self.hashes[1:]).all():
            raise UserError(f"{self.path}: is no cache of prompts: its hashes are not sorted")
        self._slices = slices
        self.shapes = {name: shape[1:] for name, (_, shape) in kinds.items()}
        self._empty: dict[str, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.hashes)

    def __contains__(self, prompt: str) -> bool:
        return self._row(prompt) is not None

    def _row(self, prompt: str) -> int | None:
        wanted = as_words(np.frombuffer(text_hash(prompt), dtype=np.uint8)[None])[0]
        row = int(np.searchsorted(self.hashes, wanted))
        return row if row < len(self.hashes) and self.hashes[row] == wanted else None

    def get(self, prompt: str) -> dict[str, Tensor] | None:
        """The outputs for a prompt, float32, one row without the batch's dimension; None if it is not there.

        Raises:
            UserError: they are not finite.
        """
        row = self._row(prompt)
        if row is None:
            return None
        found = {name: one[row].float() for name, one in self._slices.items()}
        for name, tensor in found.items():
            if not torch.isfinite(tensor).all():
                raise UserError(f"{self.path}: {name} of the prompt {prompt!r} is not finite; make the cache anew")
        return found

    def empty(self) -> dict[str, Tensor]:
        """The outputs for the empty prompt, 1 row each.

        Raises:
            UserError: it is missing.
        """
        if self._empty is None:
            found = self.get("")
            if found is None:
                raise UserError(f"{self.path}: lacks the empty prompt; make the cache anew with `shards precompute`")
            self._empty = {name: row[None] for name, row in found.items()}
        return self._empty


class PromptTables:
    """Several tables, one a folder of shards, looked through in turn; opened in the process that reads them.

    Args:
        paths: the files or URLs, each with the SHA-256 that its manifest states, if it does. They were made by the
            same encoders, so any of them that has a prompt has the right row.
    """

    def __init__(self, paths: Mapping[str, str | None]) -> None:
        self.paths = dict(paths)
        self._tables: list[PromptTable] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths, "_tables": None}  # a worker opens its own

    @property
    def tables(self) -> list[PromptTable]:
        if self._tables is None:
            found = [
                PromptTable(fetch(path, default_cache(), sha256) if is_remote(path) else path)
                for path, sha256 in self.paths.items()
            ]
            for table in found:
                if table.shapes != found[0].shapes:
                    raise UserError(
                        f"{table.path}: its rows are {table.shapes}, those of {found[0].path} {found[0].shapes}; make "
                        "one of the caches anew"
                    )
            self._tables = found
        return self._tables

    def get(self, prompt: str, where: str) -> dict[str, Tensor]:
        """As `PromptTable.get`.

        Raises:
            UserError: no table has it; names the prompt and `where`.
        """
        for table in self.tables:
            found = table.get(prompt)
            if found is not None:
                return found
        raise UserError(
            f"{where}: its prompt {prompt!r} is missing in {' and '.join(self.paths)}; make the cache anew with "
            "`shards precompute`"
        )

    def empty(self) -> dict[str, Tensor]:
        """As `PromptTable.empty`."""
        return self.tables[0].empty()


def as_words(hashes: NDArray[np.uint8]) -> NDArray[np.bytes_]:
    """uint8 (P, 16) -> (P,) texts of 16 bytes, which compare and sort as the bytes do."""
    return np.ascontiguousarray(hashes).view(f"S{HASH_BYTES}")[:, 0]


def header(names: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a safetensors file and where each tensor's numbers begin in it.

    Args:
        names: safetensors' type (`F16`, `F32`, `U8`) and shape of each tensor.
        metadata: free text by name.
    """
    sizes = {"F16": 2, "F32": 4, "U8": 1}
    listed: dict[str, Any] = {"__metadata__": metadata}
    starts, offset = {}, 0
    for name, (kind, shape) in names.items():
        stop = offset + sizes[kind] * int(np.prod(shape, dtype=np.int64))
        listed[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [offset, stop]}
        starts[name], offset = offset, stop
    text = json.dumps(listed).encode()
    text += b" " * (-len(text) % 8)
    first = len(text).to_bytes(8, "little") + text
    return first, {name: len(first) + start for name, start in starts.items()}
