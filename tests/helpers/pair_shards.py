"""Shards of drawn pairs; a sample's number can be read back from its pixels and its prompt."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

from PIL import Image

from lit_safety.data.format.manifest import Manifest
from lit_safety.data.format.writer import ShardWriter

CATEGORY_CYCLE = ("violence", "sexual", "hate")


def make_image(number: int, size: int = 8) -> Image.Image:
    """One colour, its red channel the number; the left half is darker so that a mirror shows."""
    image = Image.new("RGB", (size, size), (number % 256, 200, 50))
    image.paste((number % 256, 100, 50), (0, 0, size // 2, size))
    return image


def metadata(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "prompt": f"prompt {number}",
        "prompt_kind": "clean" if number % 4 == 3 else "harmful",
        "order": "quality" if number % 5 == 4 else "safety",
        "categories": [CATEGORY_CYCLE[number % 3]],
        "harmful": {"chosen": False, "rejected": True},
        **changes,
    }


def write_shards(folder: Path, samples: int, samples_per_shard: int, size: int = 8, first: int = 0) -> Manifest:
    with ShardWriter(folder, samples_per_shard, provenance={"source": "drawn"}, seeds={"pairs": 1}) as writer:
        for number in range(first, first + samples):
            writer.write(f"{number:05d}", metadata(number), make_image(number, size), make_image(number + 100, size))
    return writer.close()


def png(number: int, size: int = 8) -> bytes:
    buffer = io.BytesIO()
    make_image(number, size).save(buffer, "PNG")
    return buffer.getvalue()


def jpeg(number: int, size: int = 64) -> bytes:
    buffer = io.BytesIO()
    make_image(number, size).save(buffer, "JPEG")
    return buffer.getvalue()


def png_header(side: int) -> bytes:
    """The beginning of a PNG of side x side pixels, and then a little of what may follow: a bomb need not be large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000), 9))


def sample(number: int, **changes: bytes | None) -> dict[str, bytes]:
    """A sample's members by suffix; a change of None leaves one out, underscores become dots."""
    found = {
        "json": json.dumps(metadata(number)).encode(),
        "chosen.png": png(number),
        "rejected.png": png(number + 100),
        **{name.replace("_", "."): data for name, data in changes.items()},
    }
    return {name: data for name, data in found.items() if data is not None}


def write_tar(path: Path, samples: list[tuple[str, dict[str, bytes]]]) -> Path:
    """A tar as any program might write it, without a manifest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, members in samples:
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path
