"""Parquet files as tables of pairs. pyarrow is an extra of this package: `pip install 'lit-safety[parquet]'`."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lit_safety.data.converters.published import MAX_IMAGE_BYTES, Row, StoredImage, no_image, require
from lit_safety.errors import UserError

MAX_GROUP_BYTES = 4 << 30
MAX_GROUP_ROWS = 1 << 22
"""Equal values take next to no room in a file, and all of it in memory."""
KEPT_GROUPS = 4
"""Row groups held at a time. Published files have a hundred rows or so in each."""


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
        optional: columns read where they are there.
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
                raise UserError(f"{self.files[0]}: the column {one.name!r} is {one.type}, no image")
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
        """The image in a cell, out of the row groups that are held."""
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
        raise UserError(f"{path}: is no parquet file that can be read ({_line(error)})") from error


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
