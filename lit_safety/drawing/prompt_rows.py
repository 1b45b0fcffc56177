"""The rows of a file of prompts in any published form: CSV, JSON, JSON lines, parquet, or one prompt a line.

`prompts.py` decides what the columns mean. JSON is recognised by its first letter, the other forms by the file's name.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_safety.core.errors import UserError
from lit_safety.core.tables import check_header, unescaped
from lit_safety.core.text import load_json, read_text

USER_DATA, USER_ID = "user_data", "user_id"
"""Sage's rows hold the user inside an object, `user_data: {User_ID: ...}`; here it becomes an ordinary column."""
RAGGED = "has more or fewer fields than the header; quote prompts that hold commas"


@dataclass(frozen=True)
class Record:
    """One row."""

    where: str
    """File and row, for messages."""
    cells: dict[str, str]
    """Column -> text without blanks around it. In JSON, a column may be missing in a row."""
    problem: str = ""
    """Why the row cannot be read; empty: it can."""


@dataclass(frozen=True)
class Records:
    """A file's columns and rows."""

    columns: list[str]
    rows: Iterable[Record]


def read_records(file: str | Path, known: Sequence[str], texts: Sequence[str]) -> Records:
    """The rows of a file.

    Args:
        file: a CSV with a header; JSON: a list of objects or of texts, an object that holds one such list, COCO's
            captions, or pandas' columns; JSON lines; a text file with a prompt a line; parquet.
        known: columns that are read, in any case in the file.
        texts: those that may hold the prompts; the first is used for lists of texts and for text files.

    Raises:
        UserError: the file cannot be read or has another form, or a column stands twice.
    """
    path, suffix = Path(file), Path(file).suffix.lower()
    if suffix == ".parquet":
        return _from_parquet(path, known)
    try:
        text = read_text(path)
    except OSError as error:
        raise UserError(f"{file}: the prompt set cannot be read ({error.strerror})") from error
    if suffix in (".jsonl", ".ndjson") or text.lstrip()[:1] in ("[", "{"):
        return _from_json(text, str(file), known, texts[0])
    if suffix == ".txt" and not _is_csv(text, texts):
        lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1)]
        return Records([texts[0]], [Record(f"{file} line {n}", {texts[0]: line}) for n, line in lines if line])
    return _from_csv(text, str(file), known)


def _is_csv(text: str, texts: Sequence[str]) -> bool:
    """Whether the first line is a header with a column of prompts."""
    names = next(csv.reader(io.StringIO(text, newline="")), [])
    return bool({name.strip().casefold() for name in names} & {name.casefold() for name in texts})


def _from_csv(text: str, file: str, known: Sequence[str]) -> Records:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        reader.fieldnames = check_header(reader.fieldnames or (), file, known)
    except csv.Error as error:
        raise UserError(f"{file}: is not a CSV file ({error})") from error

    def rows() -> Iterator[Record]:
        try:
            for row in reader:
                where = f"{file} line {reader.line_num}"
                if None in row or None in row.values():
                    yield Record(where, {}, RAGGED)
                else:
                    yield Record(where, {name: unescaped(value).strip() for name, value in row.items()})
        except csv.Error as error:
            raise UserError(f"{file}: is not a CSV file ({error})") from error

    return Records(list(reader.fieldnames), rows())


def _from_json(text: str, file: str, known: Sequence[str], default: str) -> Records:
    """A whole JSON text, or else JSON lines."""
    try:
        whole = load_json(text, finite=False)  # pandas writes NaN for missing values
    except ValueError as error:
        if not isinstance(error, json.JSONDecodeError) or not error.msg.startswith("Extra data"):
            raise UserError(f"{file}: is not JSON ({error})") from error
        entries = list(_json_lines(text, file))
    else:
        found = whole if isinstance(whole, list) else _entries(whole, file)
        entries = [(f"{file} entry {number}", entry) for number, entry in enumerate(found, start=1)]
    for where, one in entries:
        if not isinstance(one, dict | str | None):
            raise UserError(f"{where}: must be an object with a `prompt`, or a text")
    objects = [(where, one if isinstance(one, dict) else {default: one}) for where, one in entries]
    given = dict.fromkeys(key for _, entry in objects for key in entry)
    names = dict(zip(given, check_header(list(given), file, known), strict=True))
    rows, columns = [], dict.fromkeys(names.values())
    for where, entry in objects:
        if isinstance(entry.get(default), _NotJson):
            rows.append(Record(where, {}, str(entry[default])))
            continue
        own = {names[key]: value for key, value in entry.items()}
        if isinstance(user := own.pop(USER_DATA, None), dict):
            ids = {key.casefold(): value for key, value in user.items()}
            own.setdefault(USER_ID, ids.get(USER_ID))
            columns[USER_ID] = None
        rows.append(_record(where, {key: value for key, value in own.items() if key in known}))
    return Records(list(columns), rows)


class _NotJson(str):
    """A line that cannot be read, with the reason."""


def _json_lines(text: str, file: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield f"{file} line {number}", load_json(line, finite=False)
            except ValueError as error:
                yield f"{file} line {number}", _NotJson(f"is not JSON ({error})")


def _entries(whole: Any, file: str) -> list[Any]:
    """The rows of a JSON text that is not a list."""
    if isinstance(whole, str):
        return [whole]
    if isinstance(whole, dict) and isinstance(whole.get("annotations"), list):  # COCO's captions
        return list(whole["annotations"])
    if isinstance(whole, dict) and whole:
        values = list(whole.values())
        lists = [value for value in values if isinstance(value, list)]
        if len(lists) == 1 and (len(values) == 1 or any(isinstance(one, dict) for one in lists[0])):
            return list(lists[0])
        if len(lists) == len(values) and len({len(value) for value in lists}) == 1:
            return [dict(zip(whole, row, strict=True)) for row in zip(*lists, strict=True)]
        if all(isinstance(value, dict) for value in values) and len({tuple(value) for value in values}) == 1:
            return [{key: column[row] for key, column in whole.items()} for row in values[0]]  # pandas' columns
        if not any(isinstance(value, list) for value in values):  # one line of JSON lines
            return [whole]
    raise UserError(f"{file}: is JSON of another shape; give a list of objects with a `prompt`, or a list of texts")


def _encodable(text: str) -> bool:
    """Half a surrogate pair: JSON can hold it, but UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _record(where: str, values: dict[str, Any]) -> Record:
    """A row of JSON values as the texts of a CSV; unknown values are empty."""
    cells = {}
    for name, value in values.items():
        if value is None or value != value:  # NaN
            cells[name] = ""
        elif isinstance(value, str):
            cells[name] = value.strip()
            if not _encodable(value):
                return Record(
                    where, {}, f"`{name}` holds half a character (a lone surrogate such as \\ud800); restore it"
                )
        elif isinstance(value, int | float):
            cells[name] = str(int(value)) if isinstance(value, bool) else repr(value)
        elif isinstance(value, list) and all(isinstance(one, str | int | float) for one in value):
            cells[name] = ";".join(map(str, value))
        elif name != "image":  # the hub's images are objects, which are ignored
            return Record(where, {}, f"`{name}` must be a text or a number")
    return Record(where, cells)


def _from_parquet(path: Path, known: Sequence[str]) -> Records:
    from lit_safety.data.convert.published import open_table

    columns = open_table(str(path), ()).columns
    names = dict(zip(columns, check_header(columns, str(path), known), strict=True))
    wanted = [name for name, spelt in names.items() if spelt in known and spelt != "image"]
    table = open_table(str(path), (), optional=wanted)
    return Records(
        list(names.values()),
        (_record(row.where, {names[key]: value for key, value in row.values.items()}) for row in table.rows()),
    )
