"""What an image depends on, as a hash: so that images of other weights or settings are never taken for these."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_safety.errors import UserError
from lit_safety.hashes import file_sha256, files_below

_COUNTS = {
    *(".safetensors", ".json", ".bin", ".txt", ".model", ".pt", ".pth", ".ckpt", ".npy"),
    *(".onnx", ".npz", ".gguf", ".spm", ".p"),
}
"""Suffixes of files that change what a model does. Model cards, licences and images beside them do not."""


def fingerprint(path: str | Path) -> str:
    """sha256 over the names and contents of a model's weight and config files; of a single file, its content.

    Links are followed, to files and to folders. In a pipeline's folder weights that are not loaded (half precision
    beside full) do not count.

    Raises:
        UserError: there is nothing at `path`, or a file cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        try:
            files = sorted(_files(path))
        except OSError as error:
            raise UserError(f"{error.filename or path}: cannot be read ({error.strerror})") from error
    elif path.exists():
        files = [path]
    else:
        raise UserError(f"{path}: no such file or folder")
    total = hashlib.sha256()
    for file in files:
        name = file.name if file == path else file.relative_to(path).as_posix()
        try:
            content = file_sha256(file, remember=True)
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror})") from error
        total.update(f"{name}\0{content}\n".encode("utf-8", "surrogateescape"))
    return total.hexdigest()


def _files(top: Path) -> Iterator[Path]:
    """The files below a folder that count."""
    from lit_safety.backbones.fingerprint import weight_files

    pipeline = (top / "model_index.json").is_file()
    loaded: dict[Path, set[Path]] = {}
    for file in files_below(top):
        if file.suffix not in _COUNTS:
            continue
        if pipeline and file.suffix == ".safetensors":
            if file.parent not in loaded:
                loaded[file.parent] = set(weight_files(file.parent))
            if file not in loaded[file.parent]:
                continue
        yield file


def digest(value: Any) -> str:
    """sha256 of anything that JSON can hold, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
