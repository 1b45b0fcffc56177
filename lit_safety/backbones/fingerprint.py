"""Which weights a pipeline's encoders have, told from their files without loading them.

A cache of latents and text is only right for the encoders that made it. The hash is over every tensor's name, type,
shape, first and last 4 KiB: a fine-tune or a fused adapter moves all of a matrix, and a 10 GB text encoder must not be
read at every start. How the tensors are split into files does not matter.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from lit_safety.backbones.pipeline_index import pipeline_index
from lit_safety.errors import UserError

ENDS = 4096
MAX_HEADER = 100 << 20  # safetensors' own limit


def fingerprint(source: str, parts: Sequence[str]) -> dict[str, str]:
    """Hashes of the ``parts`` of a pipeline by name, 16 hexadecimal digits each; parts without files are left out.

    Raises:
        UserError: if there is no pipeline at ``source``, or a weights file is damaged.
    """
    folder = pipeline_index(source).folder
    hashes = {part: _part_hash(folder / part) for part in parts}
    return {part: found for part, found in hashes.items() if found is not None}


def _part_hash(folder: Path) -> str | None:
    weights = sorted(folder.glob("*.safetensors"))
    if any(".fp16." not in file.name for file in weights):  # a folder with both variants: those that are loaded
        weights = [file for file in weights if ".fp16." not in file.name]
    words = [file for file in sorted(folder.glob("*")) if file.suffix in (".txt", ".model")]
    words += [file for file in sorted(folder.glob("*.json")) if file.name in ("vocab.json", "tokenizer.json")]
    if not weights and not words:
        return None
    digest = hashlib.blake2b(digest_size=8)
    for line in sorted(entry for file in weights for entry in _tensors(file)):
        digest.update(line)
    if words:  # of a tokenizer, which also says where prompts are cut
        digest.update(f"{_longest(folder / 'tokenizer_config.json')}".encode())
    for file in words:
        digest.update(file.name.encode() + hashlib.blake2b(file.read_bytes()).digest())
    return digest.hexdigest()


def _longest(file: Path) -> object:
    try:
        stated = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is no readable JSON: {error}") from error
    return stated.get("model_max_length") if isinstance(stated, dict) else None


def _tensors(path: Path) -> list[bytes]:
    """One line a tensor: its name, type, shape and a hash of its ends."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > MAX_HEADER:
                raise ValueError("its header is too long")
            header: dict[str, Any] = json.loads(file.read(size))
            return [
                json.dumps(
                    [name, entry["dtype"], entry["shape"], _ends(file, 8 + size, *entry["data_offsets"])]
                ).encode()
                for name, entry in header.items()
                if name != "__metadata__"
            ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no readable safetensors file: {error}") from error


def _ends(file: BinaryIO, base: int, start: int, stop: int) -> str:
    file.seek(base + start)
    first = file.read(min(ENDS, stop - start))
    file.seek(base + max(start, stop - ENDS))
    return hashlib.blake2b(first + file.read(min(ENDS, stop - start)), digest_size=16).hexdigest()
