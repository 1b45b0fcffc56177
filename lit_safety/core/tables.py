"""Read the tables that data sets are published with, and write tables that a spreadsheet may open.

A spreadsheet runs a cell that begins with = + - @, a tab or a carriage return as a formula. Such a text is written with
a quote before it, which our readers remove again. Numbers stay as they are.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath

from lit_safety.core.errors import UserError
from lit_safety.core.text import read_text

_WHOLE = re.compile(r"([+-]?[0-9]{1,300})(?:\.0*)?")

_FORMULA = re.compile(r"'*[=+\-@\t\r]")
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?\Z")


def csv_lines(rows: Iterable[Sequence[object]]) -> str:
    """Rows as lines of CSV. A text that a spreadsheet would run as a formula is escaped."""
    lines = []
    for row in rows:
        text = io.StringIO()
        csv.writer(text).writerow([_escaped(cell) for cell in row])  # it quotes a \r only where lines end with \r\n
        lines.append(text.getvalue().removesuffix("\r\n"))
    return "\n".join([*lines, ""])


def _escaped(cell: object) -> object:
    runs = isinstance(cell, str) and _FORMULA.match(cell) and not _NUMBER.match(cell)
    return f"'{cell}" if runs else cell


def unescaped(cell: str) -> str:
    """A cell as it was before `csv_lines` wrote it."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def check_header(header: Sequence[str], path: str, known: Iterable[str] = ()) -> list[str]:
    """The names of the columns. A name in `known` is found in any case and with blanks around it, and spelt as there.

    Raises:
        UserError: a column stands twice, perhaps with different spelling (only the last one would be read); or the
            columns are not separated by commas, as in files of spreadsheets in many countries.
    """
    if len(header) == 1 and (mark := next((mark for mark in ";\t|" if mark in header[0]), None)):
        raise UserError(f"{path}: its columns are separated by {mark!r}; save it with commas between them")
    spelt = {name.casefold(): name for name in known}
    seen: dict[str, str] = {}
    names = []
    for name in header:
        same = name.strip().casefold()
        if same and same in seen:
            also = "" if seen[same] == name else f" (as {seen[same]!r} and {name!r})"
            raise UserError(f"{path}: has the column {name.strip()!r} twice{also}; keep one")
        seen[same] = name
        names.append(spelt.get(same, name))
    return names


def read_csv(path: str, required: Iterable[str], optional: Iterable[str] = ()) -> list[dict[str, str]]:
    """The rows of a CSV with a header line, as texts.

    Args:
        path: the file.
        required: columns that it must have.
        optional: further columns that the caller reads.

    Raises:
        UserError: the file cannot be read, is not UTF-8, lacks a column or has one twice, or a row has more or fewer
            fields than the header.
    """
    required = tuple(required)
    csv.field_size_limit(1 << 20)
    try:
        with io.StringIO(read_text(path), newline="") as file:
            reader = csv.DictReader(file, strict=True)
            header = check_header(reader.fieldnames or [], path, (*required, *optional))
            reader.fieldnames = header
            rows = list(reader)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except csv.Error as error:
        raise UserError(f"{path}: is not a CSV file ({error})") from error
    if missing := [name for name in required if name not in header]:
        raise UserError(f"{path}: has no column {missing[0]!r}; its columns are {', '.join(header) or 'none'}")
    for number, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise UserError(f"{path}: row {number} does not have the header's {len(header)} fields")
    return [{name: unescaped(cell) for name, cell in row.items()} for row in rows]


def whole_number(text: str) -> int | None:
    """The whole number in a cell, also one that a spreadsheet or pandas wrote as `41.0`; None: it is not one.

    >>> [whole_number(text) for text in ("41", " 41.0 ", "-3", "41.5", "4.1E+10", "1_000", "")]
    [41, 41, -3, None, None, None, None]
    """
    match = _WHOLE.fullmatch(text.strip())
    return int(match[1]) if match else None


def decimal_number(text: str) -> float | None:
    """The number in a cell, perhaps nan or infinite; None: it is not a number."""
    try:
        return float(text) if text.isascii() and "_" not in text else None
    except ValueError:
        return None


def image_path(folder: Path, name: str, where: str) -> Path:
    """The file `name` within `folder`. A link there may lead elsewhere, as links in the hub's cache do.

    Raises:
        UserError: the name is empty or leads out of the folder.
    """
    path = PurePath(name)
    try:
        os.fsencode(name)
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: {name!r} is not a file name") from error
    if not name or "\0" in name or path.is_absolute() or ".." in path.parts:
        raise UserError(f"{where}: {name!r} is not a file within {folder}; give the images' folder with --images")
    return folder / path
