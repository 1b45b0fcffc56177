"""Tables of data sets as hubs publish them: parquet files, or a `metadata.jsonl` next to images (imagefolder).

Both give the same rows. An image is read only when its pair is written. So a resumed run does not read what it skips,
and memory does not grow with the table.
"""

from __future__ import annotations

import errno
import functools
import glob
import os
import re
import stat
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lit_safety.core.errors import UserError
from lit_safety.core.tables import image_path
from lit_safety.core.text import NotUtf8, decode_text, load_json

METADATA = "metadata.jsonl"
MAX_LINE = 1 << 20
MAX_IMAGE_BYTES = 128 << 20
# The hub's names of parquet files: train-00000-of-00008.parquet, or train-00000-of-00008-0a1b2c3d.parquet.
_PART = re.compile(r"(?P<split>.+)-\d+-of-\d+.*\.parquet")


@dataclass(frozen=True)
class StoredImage:
    """An image in a table, not read yet."""

    name: str | None
    """Its file name as published, if the table states it."""
    read: Callable[[], bytes]
    """Gives the file's bytes; raises FileNotFoundError or UserError."""


@dataclass(frozen=True)
class Row:
    """One row: texts, numbers, and a `StoredImage` for an image in the table itself."""

    where: str
    """File and row, for messages."""
    values: dict[str, Any]


class Table(Protocol):
    """Rows in a fixed order, which can be read several times."""

    folder: Path
    """Names of images in the table are relative to this."""
    columns: tuple[str, ...]
    total: int
    identity: list[Any]
    """Can be written as JSON; different for another table."""

    def rows(self) -> Iterator[Row]: ...


def open_table(source: str, columns: Sequence[str], images: Sequence[str] = (), optional: Sequence[str] = ()) -> Table:
    """Open the table that `source` names: a parquet file, a pattern or folder of them, or a folder with images and
    `metadata.jsonl`.

    Args:
        source: the table.
        columns: columns that it must have.
        images: columns that hold an image or its name; it must have them too.
        optional: columns that are read if it has them.

    Raises:
        UserError: there is no table, a column is missing, or several splits are in one folder.
    """
    path = Path(source)
    metadata = path / METADATA if path.is_dir() else path
    if metadata.suffix == ".jsonl" and metadata.exists():
        return JsonLines(metadata, (*columns, *images))
    files = _parquet_files(source)

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
        from lit_safety.core.hashes import file_sha256

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
                values = load_json(decode_text(line, where), finite=False)  # numbers are checked where they are used
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
    """Refuse a table without a needed column.

    Raises:
        UserError: names it and the columns that there are.
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
        if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe might never end
            raise UserError(f"{path}: is not a file")
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
    """The error for an image that a table names but that does not exist."""
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)


# Parquet files as tables of pairs. pyarrow is an extra of this package: `pip install 'lit-safety[parquet]'`.


MAX_GROUP_BYTES = 4 << 30
MAX_GROUP_ROWS = 1 << 22
"""Equal values need little space in a file, but their full size in memory."""
KEPT_GROUPS = 4
"""How many row groups are held at a time. Published files have about a hundred rows in each."""


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"parquet files need pyarrow ({error}): pip install 'lit-safety[parquet]'") from error
    return pyarrow


class ParquetTable:
    """The rows of several files of one layout, one file after another.

    A column of bytes, or of structs with `bytes` and `path` (the hub's image type), becomes a `StoredImage`; names,
    texts and numbers are read with the rows.

    Args:
        files: in order.
        needed: columns that must be there.
        optional: columns that are read if the files have them.
    """

    def __init__(self, files: Sequence[Path], needed: Sequence[str], optional: Sequence[str] = ()) -> None:
        self._arrow = _pyarrow()
        self.files = list(files)
        self.folder = self.files[0].parent
        self._groups: OrderedDict[tuple[int, int], Any] = OrderedDict()
        schema = self._open(0).schema_arrow
        for number, path in enumerate(self.files):
            require(path, self._open(number).schema_arrow.names, needed)
        self.columns = tuple(schema.names)
        wanted = [schema.field(name) for name in schema.names if name in (*needed, *optional)]
        types = self._arrow.types
        self._bytes = [one.name for one in wanted if types.is_binary(one.type) or types.is_large_binary(one.type)]
        self._structs = [one.name for one in wanted if types.is_struct(one.type)]
        for one in wanted:
            if one.name in self._structs and not {"bytes", "path"} <= {inner.name for inner in one.type}:
                raise UserError(f"{self.files[0]}: the column {one.name!r} is {one.type}, not an image")
        images = {*self._bytes, *self._structs}
        self._plain = [one.name for one in wanted if one.name not in images]
        rows = [self._open(number).metadata.num_rows for number in range(len(self.files))]
        self.total = sum(rows)
        self.identity = [[path.name, path.stat().st_size, n] for path, n in zip(self.files, rows, strict=True)]

    def rows(self) -> Iterator[Row]:
        light = [*self._plain, *(f"{name}.path" for name in self._structs)]
        for number, path in enumerate(self.files):
            before = 0
            for group in range(self._open(number).num_row_groups):
                read = self._read(number, group, light).to_pydict() if light else {}
                for index in range(self._open(number).metadata.row_group(group).num_rows):
                    values = {name: read[name][index] for name in self._plain}
                    for name in self._structs:
                        values[name] = self._image(number, group, index, name, (read[name][index] or {}).get("path"))
                    for name in self._bytes:
                        values[name] = self._image(number, group, index, name, None)
                    yield Row(f"{path}: row {before + index}", values)
                before += self._open(number).metadata.row_group(group).num_rows

    def _image(self, file: int, group: int, index: int, column: str, name: str | None) -> StoredImage:
        return StoredImage(name, functools.partial(self._cell, file, group, index, column))

    def _cell(self, file: int, group: int, index: int, column: str) -> bytes:
        """The image in a cell, from the row groups that are held."""
        spot = (file, group)
        if spot not in self._groups:
            self._groups[spot] = self._read(file, group, [*self._bytes, *(f"{name}.bytes" for name in self._structs)])
            if len(self._groups) > KEPT_GROUPS:
                self._groups.popitem(last=False)
        self._groups.move_to_end(spot)
        cell = self._groups[spot].column(column)[index].as_py()
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        where = f"{self.files[file]}: row {index} of row group {group}: {column}"
        if data is None:
            raise no_image(where)
        if len(data) > MAX_IMAGE_BYTES:
            raise UserError(f"{where} is over the limit of {MAX_IMAGE_BYTES} bytes")
        return data

    def _open(self, number: int) -> Any:
        return _open_file(self._arrow, self.files[number])

    def _read(self, file: int, group: int, columns: list[str]) -> Any:
        parquet = self._open(file)
        size = parquet.metadata.row_group(group).total_byte_size
        if (rows := parquet.metadata.row_group(group).num_rows) > MAX_GROUP_ROWS:
            raise UserError(
                f"{self.files[file]}: row group {group} has {rows} rows, over the limit; write smaller ones"
            )
        if size > MAX_GROUP_BYTES:
            raise UserError(
                f"{self.files[file]}: row group {group} is {size} bytes, over the limit; write smaller ones"
            )
        try:
            return parquet.read_row_group(group, columns=columns, use_threads=False)
        except (self._arrow.ArrowException, OSError, ValueError) as error:
            raise UserError(f"{self.files[file]}: row group {group} cannot be read ({_line(error)})") from error


@functools.lru_cache(maxsize=8)
def _open_file(arrow: Any, path: Path) -> Any:
    try:
        return arrow.parquet.ParquetFile(path)
    except (arrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: is not a parquet file that can be read ({_line(error)})") from error


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
