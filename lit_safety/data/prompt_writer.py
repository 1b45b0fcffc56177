"""Write `prompts.safetensors`: rows go to disk as they are made, and a run that was stopped goes on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lit_safety.bounded import load_json
from lit_safety.data.atomic import partial_name, sync_folder, write_atomic
from lit_safety.data.cache import PROMPTS
from lit_safety.data.prompt_table import HASH_BYTES, HASHES, header, text_hash
from lit_safety.errors import UserError

KINDS = {"float16": "F16", "float32": "F32"}
Encoder = Callable[[Sequence[str]], dict[str, Tensor]]


def write_prompts(
    folder: Path,
    prompts: Iterable[str],
    encode: Encoder,
    made_by: dict[str, str],
    dtype: str,
    batch_size: int,
    tick: Callable[[], None],
) -> Path:
    """Encode prompts, the empty one among them, into `folder/prompts.safetensors`.

    Args:
        folder: where to.
        prompts: texts; each is encoded once.
        encode: B prompts -> outputs by name, B rows each.
        made_by: what decides the rows besides the prompts; goes into the file. A stopped run of other settings is
            thrown away.
        dtype: how rows are stored: float16 or float32.
        batch_size: prompts a call of ``encode``.
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
        for start in range(partial.rows, len(ordered), batch_size):
            batch = ordered[start : start + batch_size]
            rows = {name: _stored(tensor, dtype, name, batch) for name, tensor in encode(batch).items()}
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
    """The file while it is written, with a note beside it of how many rows are whole."""

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
