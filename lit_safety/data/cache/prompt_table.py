"""`prompts.safetensors`: the text encoders' outputs of every prompt of a cached set, by the text's hash.

One row a prompt: `hashes` uint8 (P, 16), sorted, and for each output a tensor (P, ...). The empty prompt is always
among them. Rows are read from disk one by one, so memory is 16 bytes a prompt, however long the rows are.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lit_safety.core.errors import UserError
from lit_safety.core.files import partial_name, sync_folder, write_atomic
from lit_safety.core.hashes import check_regular
from lit_safety.core.text import load_json
from lit_safety.data.cache.cache import PROMPTS, all_finite
from lit_safety.data.format.sample import parse_metadata
from lit_safety.data.reading.source import Source, default_cache, fetch, is_remote

HASHES = "hashes"
HASH_BYTES = 16
_TYPES = {"F16": "float16", "F32": "float32"}


def text_hash(prompt: str) -> bytes:
    """The 16-byte hash of a prompt."""
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
            raise UserError(
                f"{self.path}: is not a readable cache of prompts ({error}); make the cache again"
            ) from error
        rows = len(hashes) if hashes.ndim else 0
        wrong = [n for n, (kind, shape) in kinds.items() if kind not in _TYPES or len(shape) < 2 or shape[0] != rows]
        if hashes.dtype is not torch.uint8 or tuple(hashes.shape) != (rows, HASH_BYTES) or wrong or not self.names:
            raise UserError(f"{self.path}: is not a cache of prompts: {wrong or HASHES} has another type or shape")
        self.hashes = as_words(hashes.numpy())
        if rows > 1 and not (self.hashes[:-1] < self.hashes[1:]).all():
            raise UserError(f"{self.path}: is not a cache of prompts: its hashes are not sorted")
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
        """The outputs for a prompt, float32, one row without the batch dimension; None if the prompt is missing.

        Raises:
            UserError: they are not finite.
        """
        row = self._row(prompt)
        if row is None:
            return None
        found = {name: one[row].float() for name, one in self._slices.items()}
        for name, tensor in found.items():
            if not all_finite(tensor):
                raise UserError(f"{self.path}: {name} of the prompt {prompt!r} is not finite; make the cache again")
        return found

    def empty(self) -> dict[str, Tensor]:
        """The outputs for the empty prompt, 1 row each.

        Raises:
            UserError: it is missing.
        """
        if self._empty is None:
            found = self.get("")
            if found is None:
                raise UserError(f"{self.path}: lacks the empty prompt; make the cache again with `shards precompute`")
            self._empty = {name: row[None] for name, row in found.items()}
        return self._empty


class PromptTables:
    """Several tables, one a folder of shards, searched in turn; opened in the process that reads them.

    Args:
        paths: the files or URLs, each with the SHA-256 that its manifest states, or None. The same encoders made all of
            them, so any table that has a prompt has the right row.
    """

    def __init__(self, paths: Mapping[str, str | None]) -> None:
        self.paths = dict(paths)
        self._tables: list[PromptTable] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths, "_tables": None}  # each worker opens its own files

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
                        "one of the caches again"
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
            f"{where}: its prompt {prompt!r} is missing in {' and '.join(self.paths)}; make the cache again with "
            "`shards precompute`"
        )

    def empty(self) -> dict[str, Tensor]:
        """As `PromptTable.empty`."""
        return self.tables[0].empty()


def as_words(hashes: NDArray[np.uint8]) -> NDArray[np.bytes_]:
    """uint8 (P, 16) -> (P,) strings of 16 bytes, which compare and sort as the bytes do."""
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


# The different prompts of a source, in their order in the shards.


def prompts_of(source: Source) -> list[str]:
    """Read only the JSON member of every sample.

    Raises:
        UserError: one cannot be read; names the sample.
    """
    found: dict[str, None] = {}
    for number in range(len(source.paths)):
        shard = source.open_shard(number)
        try:
            for sample in range(source.manifest.shardlist[number].nsamples):
                metadata = parse_metadata(shard.read_member(sample, "json"), shard.where(sample))
                found[metadata.prompt] = None
        finally:
            shard.close()
    return list(found)


# Write `prompts.safetensors`: rows go to disk as they are made, and a stopped run can continue.


KINDS = {"float16": "F16", "float32": "F32"}
#: Batches of B prompts -> their outputs by name, B rows each, in order.
Encoder = Callable[[Iterable[Sequence[str]]], Iterator[Mapping[str, Tensor | NDArray[Any]]]]


def write_prompt_table(
    folder: Path,
    prompts: Iterable[str],
    encode: Encoder,
    made_by: dict[str, str],
    dtype: str,
    batch_size: int,
    tick: Callable[[], None],
) -> Path:
    """Encode prompts and the empty prompt into `folder/prompts.safetensors`.

    Args:
        folder: the output folder.
        prompts: texts; each is encoded once.
        encode: batches of B prompts -> outputs by name, B rows each, in the order of the batches.
        made_by: the settings that decide the rows, stored in the file. What a stopped run with other settings left is
            deleted.
        dtype: how rows are stored: float16 or float32.
        batch_size: prompts of a batch.
        tick: called after every prompt.

    Raises:
        UserError: a row is not finite in ``dtype`` (names the prompt), or the disk is full.
    """
    ordered = sorted({"", *prompts}, key=text_hash)
    hashes = b"".join(text_hash(prompt) for prompt in ordered)
    metadata = {**made_by, "dtype": dtype, "prompts": hashlib.sha256(hashes).hexdigest()}
    path = folder / PROMPTS
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = _Partial(path, metadata)
        if partial.complete:
            return path
        starts = range(partial.rows, len(ordered), batch_size)
        batches = [ordered[start : start + batch_size] for start in starts]
        for start, batch, found in zip(starts, batches, encode(batches), strict=True):
            rows = {name: _stored(torch.as_tensor(one), dtype, name, batch) for name, one in found.items()}
            if start == 0:
                partial.begin(hashes, {name: tuple(one.shape[1:]) for name, one in rows.items()}, dtype)
            partial.write(start, rows)
            for _ in batch:
                tick()
        partial.finish()
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
    return path


class _Partial:
    """The file while it is written, with a note next to it that says how many rows are complete."""

    def __init__(self, path: Path, metadata: dict[str, str]) -> None:
        self.path = path
        self.metadata = metadata
        self.file = partial_name(path)
        self.note = path.with_name(f".{path.name}.rows.json")
        self.rows = 0
        self._starts: dict[str, int] = {}
        self.complete = path.exists() and _metadata_of(path) == metadata
        if self.complete or not (self.note.exists() and self.file.exists()):
            return
        found = load_json(self.note.read_text(encoding="utf-8"))
        if _metadata_of(self.file) == metadata and isinstance(found.get("rows"), int):
            self.rows, self._starts = found["rows"], found["starts"]

    def begin(self, hashes: bytes, shapes: dict[str, tuple[int, ...]], dtype: str) -> None:
        count = len(hashes) // HASH_BYTES
        names = {name: (KINDS[dtype], (count, *shape)) for name, shape in shapes.items()}
        first, self._starts = header(names | {HASHES: ("U8", (count, HASH_BYTES))}, self.metadata)
        with self.file.open("wb") as file:
            file.write(first)
            file.seek(self._starts[HASHES])
            file.write(hashes)  # it is the last, so the file has its full size from here on

    def write(self, start: int, rows: dict[str, np.ndarray]) -> None:
        with self.file.open("r+b") as file:
            for name, array in rows.items():
                file.seek(self._starts[name] + start * array[0].nbytes)
                file.write(array.tobytes())
            file.flush()
            os.fsync(file.fileno())
        self.rows = start + len(next(iter(rows.values())))
        write_atomic(self.note, json.dumps({"rows": self.rows, "starts": self._starts}).encode())

    def finish(self) -> None:
        os.replace(self.file, self.path)
        sync_folder(self.path.parent)
        self.note.unlink(missing_ok=True)


def _stored(rows: Tensor, dtype: str, name: str, prompts: Sequence[str]) -> np.ndarray:
    stored = rows.to(getattr(torch, dtype))
    good = torch.isfinite(stored).flatten(1).all(1).tolist()
    if not all(good):
        prompt = prompts[good.index(False)]
        raise UserError(f"{name} of the prompt {prompt!r} is not finite in {dtype}; try --dtype float32")
    return stored.cpu().numpy()


def _metadata_of(path: Path) -> dict[str, str] | None:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        try:
            return load_json(file.read(min(size, 1 << 20)))["__metadata__"]
        except (ValueError, KeyError, TypeError):
            return None
