"""The same drawn rows in both published forms: parquet files, and a folder with metadata.jsonl."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

RED, GREEN = (255, 0, 0), (0, 255, 0)


def jpeg(colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "JPEG")
    return buffer.getvalue()


def write_folder(folder: Path, rows: list[dict[str, Any]], images: dict[str, bytes]) -> str:
    """metadata.jsonl next to its images; it calls `image` `file_name`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in images.items():
        (folder / name).write_bytes(data)
    renamed = [{("file_name" if name == "image" else name): value for name, value in row.items()} for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in renamed) + "\n\n", encoding="utf-8")
    return str(folder)


def write_parquet(path: Path, rows: list[dict[str, Any]], images: dict[str, bytes], as_bytes: tuple[str, ...]) -> str:
    """Parquet with 3 rows a row group: `image` as the hub's struct, columns of `as_bytes` as bytes."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    path.parent.mkdir(parents=True, exist_ok=True)
    cells: list[dict[str, Any]] = []
    for row in rows:
        cell = dict(row)
        if "image" in cell:
            cell["image"] = {"bytes": images.get(cell["image"]), "path": cell["image"]}
        for name in as_bytes:
            cell[name] = None if cell[name] is None else images.get(cell[name])
        cells.append(cell)
    parquet.write_table(pyarrow.Table.from_pylist(cells), path, row_group_size=3)
    return str(path)


Writer = Callable[[Path, list[dict[str, Any]], dict[str, bytes]], str]
