"""What a picture depends on, as a hash: so that pictures of other weights or settings are never taken for these."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from lit_safety.errors import UserError
from lit_safety.weights import is_hidden

_COUNTS = {".safetensors", ".json", ".bin", ".txt", ".model", ".pt", ".pth", ".ckpt", ".npy"}
"""Suffixes of files that change what a model does. Model cards, licences and pictures beside them do not."""


def fingerprint(path: str | Path) -> str:
    """sha256 over the names and contents of a model's weight and config files; of a single file, its content."""
    path = Path(path)
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    files = [f for f in files if f == path or (f.suffix in _COUNTS and not is_hidden(f) and f.is_file())]
    total = hashlib.sha256()
    for file in files:
        name = file.name if file == path else file.relative_to(path).as_posix()
        try:
            with file.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror})") from error
        total.update(f"{name}\0{content}\n".encode())
    return total.hexdigest()


def digest(value: Any) -> str:
    """sha256 of anything that JSON can hold, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
