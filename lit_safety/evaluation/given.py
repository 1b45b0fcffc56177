"""Prompts and a judge that are given in a YAML or in a call, instead of in files: written out as these files."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lit_safety.core.errors import Complaints, UserError
from lit_safety.core.files import write_atomic
from lit_safety.drawing.prompts import HARMFUL_KINDS, KINDS, OWN

PromptsGiven = list[dict[str, Any] | str] | str
"""A list of rows or of bare prompts, or the file that holds them."""
JudgeGiven = dict[str, Any] | str
"""`class_path` and `init_args`, or the file or folder that describes the judge."""


def prompt_file(prompts: PromptsGiven, out: Path, key: str = "--prompts") -> str:
    """The file of the prompts: the one that was given, or `out`/prompts.csv with the rows that were given.

    A row without a seed gets its place in the list as its seed, so that each prompt has an image of its own.

    Args:
        prompts: rows of `prompt` and what a prompt file's other columns hold, `kind` and `category` above all; a text
            is a row with this prompt alone, as in a file.
        out: the report's folder.
        key: what they were given by, for messages.

    Raises:
        UserError: names every row and key that is wrong, in one line.
    """
    if isinstance(prompts, str):
        return prompts
    if not prompts:
        raise UserError(f"{key}: the list is empty; name some prompts")
    rows: list[dict[str, str]] = []
    complaints = Complaints(key)
    for n, row in enumerate(prompts, 1):
        with complaints.gather():
            rows.append(_row(row, f"{key}: prompt {n}", n))
    complaints.complain()
    columns = [name for name in OWN if any(name in row for row in rows)]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=columns, restval="")
    writer.writeheader()
    writer.writerows(rows)
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "prompts.csv", text.getvalue().encode())
    return str(out / "prompts.csv")


def _row(row: Any, where: str, number: int) -> dict[str, str]:
    if isinstance(row, str):
        row = {"prompt": row}
    if not isinstance(row, Mapping):
        raise UserError(
            f"{where} is {str(row)[:60]!r}: write {{prompt: ...}}, and perhaps a kind, one of {', '.join(KINDS)}"
        )
    if unknown := [name for name in row if name not in OWN]:
        raise UserError(f"{where} has an unknown key {unknown[0]!r}; it may have {', '.join(OWN)}")
    cells = {name: _cell(value, f"{where}: {name}") for name, value in row.items() if value is not None}
    if not cells.get("prompt", "").strip():
        raise UserError(f"{where} has no `prompt`")
    kind = cells.get("kind", "explicit" if cells.get("category") else "")
    if kind and kind not in KINDS:
        raise UserError(f"{where} ({cells['prompt'][:40]}): kind is {kind!r}; it must be one of {', '.join(KINDS)}")
    if kind in HARMFUL_KINDS and not cells.get("category"):
        raise UserError(f"{where} ({cells['prompt'][:40]}): an {kind} prompt needs a category, such as violence")
    return {"seed": str(number), **({"kind": kind} if kind else {}), **cells}


def _cell(value: Any, where: str) -> str:
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, list):
        return ";".join(map(str, value))
    if isinstance(value, str | int | float):
        return str(value)
    raise UserError(f"{where} is {str(value)[:60]!r}; it must be a text or a number")


def judge_file(judge: JudgeGiven, out: Path, key: str = "--judge") -> str:
    """The file or folder that describes the judge: the one that was given, or `out`/judge.yaml with what was given.

    Args:
        judge: `class_path` and `init_args`, as in configs/judges, or a file or folder.
        out: the report's folder.
        key: what it was given by, for messages.

    Raises:
        UserError: it has no `class_path`, or something else beside it.
    """
    if isinstance(judge, str):
        return judge
    said = plain(judge)
    if "class_path" not in said or said.keys() - {"class_path", "init_args"}:
        raise UserError(
            f"{key}: must be a file, a folder, or `class_path` and `init_args`, as configs/judges/* hold them"
        )
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "judge.yaml", yaml.safe_dump(said, sort_keys=False, allow_unicode=True).encode())
    return str(out / "judge.yaml")


def plain(value: Any) -> Any:
    """Nested settings as plain lists and mappings: jsonargparse hands a mapping with a class_path on as an object."""
    if not isinstance(value, Mapping | str | Sequence) and hasattr(value, "as_dict"):
        value = value.as_dict()
    if isinstance(value, Mapping):
        return {name: plain(one) for name, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value
