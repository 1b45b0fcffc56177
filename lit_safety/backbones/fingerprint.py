"""Which weights a pipeline's encoders have, told from their files without loading them.

A cache of latents and text is only right for the encoders that made it. The hash is over every tensor's name, type,
shape, first and last 4 KiB: a fine-tune or a fused adapter moves all of a matrix, and a 10 GB text encoder must not be
read at every start. How the tensors are split into files does not matter. Of a text encoder the settings that decide
its numbers beside the weights count too (`SETTINGS`), with their class's defaults filled in, so that a file that states
a default and one that leaves it out are alike.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from lit_safety.backbones.pipeline_index import pipeline_index
from lit_safety.bounded import load_json
from lit_safety.errors import UserError

ENDS = 4096
MAX_HEADER = 100 << 20  # safetensors' own limit
#: What of a text encoder's config.json decides its output: the weights' shapes say the rest.
SETTINGS = (
    "hidden_act",
    "num_hidden_layers",
    "num_layers",
    "num_attention_heads",
    "num_heads",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "eos_token_id",
    "use_attention_mask",
    "feed_forward_proj",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
)
#: What stands for a component that the pipeline's index says it ships without.
ABSENT = "absent"


def fingerprint(source: str, parts: Sequence[str]) -> dict[str, str]:
    """Hashes of the ``parts`` of a pipeline by name, 16 hexadecimal digits each; parts without files are left out, and
    those that the pipeline ships without are `absent`.

    Raises:
        UserError: if there is no pipeline at ``source``, or a weights file is damaged.
    """
    index = pipeline_index(source)
    hashes = {
        part: _part_hash(index.folder / part, index.components[part]) if part in index.components else ABSENT
        for part in parts
    }
    return {part: found for part, found in hashes.items() if found is not None}


def _part_hash(folder: Path, kind: tuple[str, str]) -> str | None:
    # Of a folder with several variants, as a clone of SD1.5 is, those that are loaded.
    weights = [file for file in sorted(folder.glob("*.safetensors")) if ".non_ema." not in file.name]
    weights = [file for file in weights if ".fp16." not in file.name] or weights
    words = [file for file in sorted(folder.glob("*")) if file.suffix in (".txt", ".model")]
    words += [file for file in sorted(folder.glob("*.json")) if file.name in ("vocab.json", "tokenizer.json")]
    if not weights and not words:
        return None
    digest = hashlib.blake2b(digest_size=8)
    for line in sorted(entry for file in weights for entry in _tensors(file)):
        digest.update(line)
    if weights and kind[0] == "transformers":
        digest.update(_settings(folder, kind[1]))
    if words:  # of a tokenizer, which also says where prompts are cut
        digest.update(f"{_longest(folder / 'tokenizer_config.json')}".encode())
    for file in words:
        digest.update(file.name.encode() + hashlib.blake2b(file.read_bytes()).digest())
    return digest.hexdigest()


def _settings(folder: Path, class_name: str) -> bytes:
    """Those of `SETTINGS` that a text encoder's configuration has, as JSON."""
    import transformers

    kind = getattr(getattr(transformers, class_name, None), "config_class", None)
    if kind is None or not (folder / "config.json").is_file():
        return b""
    try:
        config = kind.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder / 'config.json'} is no readable configuration: {error}") from error
    return json.dumps({name: getattr(config, name) for name in SETTINGS if hasattr(config, name)}).encode()


def _longest(file: Path) -> object:
    try:
        stated = load_json(file.read_text(encoding="utf-8"))
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
            header: dict[str, Any] = load_json(file.read(size))
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
