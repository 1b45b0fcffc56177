"""Tables that data sets are published with on hubs: parquet files, or a `metadata.jsonl` beside images (imagefolder).

Both give the same rows. Images are not read with the rows, only when a pair is written, so that a resumed run does not
read what it skips and memory does not grow with the table.
"""

from __future__ import annotations

import errno
import glob
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lit_safety.bounded import load_json
from lit_safety.data.converters.table import image_path
from lit_safety.errors import UserError
from lit_safety.text_files import NotUtf8, decode_text

METADATA = "metadata.jsonl"
MAX_LINE = 1 << 20
MAX_IMAGE_BYTES = 128 << 20
# The hub's names of parquet files: train-00000-of-00008.parquet, or train-00000-of-00008-0a1b2c3d.parquet.
_PART = re.compile(r"(?P<split>.+)-\d+-of-\d+.*\.parquet")


@dataclass(frozen=True)
class StoredImage:
    """An image of a table, not read yet."""

    name: str | None
    """Its file name as published, if the table says one."""
    read: Callable[[], bytes]
    """Gives the file's bytes; raises FileNotFoundError or UserError."""


@dataclass(frozen=True)
class Row:
    """One row: texts, numbers, and a `StoredImage` where the table holds an image itself."""

    where: str
    """File and row, for messages."""
    values: dict[str, Any]


class Table(Protocol):
    """Rows in a fixed order, as often as they are asked for."""

    folder: Path
    """Names of images in the table are relative to this."""
    columns: tuple[str, ...]
    total: int
    identity: list[Any]
    """JSON-able; differs when another table is read."""

    def rows(self) -> Iterator[Row]: ...


def open_table(source: str, columns: Sequence[str], images: Sequence[str] = (), optional: Sequence[str] = ()) -> Table:
    """Open the table that `source` names: a parquet file, a pattern or folder of them, or a folder with images and
    `metadata.jsonl`.

    Args:
        source: what is read.
        columns: must be there.
        images: columns that hold an image or the name of one; must be there too.
        optional: read where they are there.

    Raises:
        UserError: nothing is there, a column is missing, or several splits lie in one folder.
    """
    path = Path(source)
    metadata = path / METADATA if path.is_dir() else path
    if metadata.suffix == ".jsonl" and metadata.exists():
        return JsonLines(metadata, (*columns, *images))
    files = _parquet_files(source)
    from lit_safety.data.converters.parquet import ParquetTable

    return ParquetTable(files, (*columns, *images), optional)


def _parquet_files(source: str) -> list[Path]:
    if os.path.isdir(source):
        found = sorted(Path(source).rglob("[!.]*.parquet"))
    elif "*" in source or "?" in source:
        found = [
            Path(name)
            for name in sorted(glob.glob(source))
            if name.endswith(".parquet") and not os.path.basename(name).startswith("._")
        ]
    else:
        found = [Path(source)] if source.endswith(".parquet") and os.path.exists(source) else []
    if not found:
        raise UserError(
            f"{source}: holds neither {METADATA} nor parquet files; give the folder that was downloaded, a parquet "
            "file, or a pattern such as 'data/train-*.parquet'"
        )
    splits = {match["split"] for path in found if (match := _PART.fullmatch(path.name))}
    if len(splits) > 1:
        raise UserError(
            f"{source}: holds several splits ({', '.join(sorted(splits))}), which must not be mixed; give a pattern "
            f"such as '{found[0].parent}/{sorted(splits)[-1]}-*.parquet'"
        )
    return found


class JsonLines:
    """A `metadata.jsonl` and the images in its folder; the column `file_name` becomes the image `image`."""

    def __init__(self, path: Path, needed: Sequence[str]) -> None:
        from lit_safety.data.manifest import file_sha256

        self.path, self.folder = path, path.parent
        self.total = sum(1 for _ in self._lines())
        first = next(self.rows(), None)
        self.columns = () if first is None else tuple(first.values)
        require(path, self.columns, needed)
        self.identity = [path.name, file_sha256(path)]

    def rows(self) -> Iterator[Row]:
        for number, line in self._lines():
            where = f"{self.path}: line {number}"
            try:
                values = load_json(decode_text(line, where), finite=False)  # what needs a number checks it
            except NotUtf8:
                raise
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where}: is not JSON ({error})") from error
            if not isinstance(values, dict):
                raise UserError(f"{where}: must be a JSON object")
            if isinstance(name := values.get("file_name"), str):
                values = {**values, "image": self.image(name, where)}
            yield Row(where, values)

    def image(self, name: str, where: str) -> StoredImage:
        return StoredImage(name, lambda: read_file(image_path(self.folder, name, where)))

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """Numbered lines that are not blank."""
        try:
            with open(self.path, "rb") as file:
                number = 0
                while line := file.readline(MAX_LINE + 1):
                    number += 1
                    if len(line) > MAX_LINE:
                        raise UserError(f"{self.path}: line {number} is over the limit of {MAX_LINE} bytes")
                    if line.strip():
                        yield number, line
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from error


def require(path: Path, columns: Sequence[str], needed: Sequence[str]) -> None:
    """Complain about a column that is not there.

    Raises:
        UserError: names it and those that are.
    """
    if missing := [name for name in needed if name not in columns]:
        raise UserError(f"{path}: has no column {missing[0]!r}; its columns are {', '.join(columns) or 'none'}")


def read_file(path: Path) -> bytes:
    """The bytes of an image file.

    Raises:
        FileNotFoundError: there is none.
        UserError: it cannot be read, or is too large to be an image.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
            raise UserError(f"{path}: is no file")
        with open(path, "rb") as file:
            data = file.read(MAX_IMAGE_BYTES + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if len(data) > MAX_IMAGE_BYTES:
        raise UserError(f"{path}: is over the limit of {MAX_IMAGE_BYTES} bytes")
    return data


def no_image(name: str) -> FileNotFoundError:
    """What a reader raises for an image that a table names and nobody has."""
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
