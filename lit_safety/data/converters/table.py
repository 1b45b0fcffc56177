"""Read the tables that data sets are published with."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePath

from lit_safety.errors import UserError
from lit_safety.text_files import read_text

_WHOLE = re.compile(r"([+-]?[0-9]{1,300})(?:\.0*)?")


def read_csv(path: str, required: Iterable[str]) -> list[dict[str, str]]:
    """The rows of a CSV with a header line, as texts.

    Raises:
        UserError: the file cannot be read, is not UTF-8, lacks a column, or a row has more fields than the header.
    """
    csv.field_size_limit(1 << 20)
    try:
        with io.StringIO(read_text(path), newline="") as file:
            reader = csv.DictReader(file, strict=True)
            rows = list(reader)
            header = reader.fieldnames or []
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except csv.Error as error:
        raise UserError(f"{path}: is not a CSV file ({error})") from error
    if missing := [name for name in required if name not in header]:
        raise UserError(f"{path}: has no column {missing[0]!r}; its columns are {', '.join(header) or 'none'}")
    for number, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise UserError(f"{path}: row {number} does not have the header's {len(header)} fields")
    return rows


def whole_number(text: str) -> int | None:
    """The whole number that a cell holds, also one that a spreadsheet or pandas wrote as `41.0`; None: it holds none.

    >>> [whole_number(text) for text in ("41", " 41.0 ", "-3", "41.5", "4.1E+10", "1_000", "")]
    [41, 41, -3, None, None, None, None]
    """
    match = _WHOLE.fullmatch(text.strip())
    return int(match[1]) if match else None


def decimal_number(text: str) -> float | None:
    """The number that a cell holds, perhaps nan or infinite; None: it holds none."""
    try:
        return float(text) if text.isascii() and "_" not in text else None
    except ValueError:
        return None


def image_path(folder: Path, name: str, where: str) -> Path:
    """The file `name` within `folder`. A link there may lead elsewhere, as those in the hub's cache do.

    Raises:
        UserError: the name is empty or leads out of the folder.
    """
    path = PurePath(name)
    try:
        os.fsencode(name)
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: {name!r} is no name of a file") from error
    if not name or "\0" in name or path.is_absolute() or ".." in path.parts:
        raise UserError(f"{where}: {name!r} is not a file within {folder}; give the images' folder with --images")
    return folder / path
