"""Writing the report of an evaluation for users: metrics.json, table.md, verdicts.csv, index.html."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from lit_safety.data.atomic import write_atomic
from lit_safety.data.converters.table import csv_lines
from lit_safety.evaluation.judges import JudgeError
from lit_safety.evaluation.user_answers import within_bounds
from lit_safety.evaluation.user_metrics import metrics
from lit_safety.evaluation.user_page import page
from lit_safety.evaluation.user_table import markdown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lit_safety.evaluation.judges import Verdict
    from lit_safety.evaluation.user_rows import UserRow
    from lit_safety.evaluation.user_run import UserResults

COLUMNS = (
    *("arm", "file", "user", "split", "part", "banned", "prompt", "kind", "category", "concept", "benign", "seed"),
    *("judge", "within_bounds", "harmful", "present", "error"),
)
"""Of verdicts.csv: who was asked what, then what one judge said."""


def write_user_report(results: UserResults, blur: bool) -> dict[str, Any]:
    """Write all files of a report into `results.out` and return the content of metrics.json, which comes last.

    Args:
        results: rows, pictures and verdicts.
        blur: veil what the judge calls harmful until it is clicked.

    Raises:
        UserError: a file cannot be written.
    """
    found = metrics(results)
    write_atomic(results.out / "verdicts.csv", verdicts_csv(results).encode())
    write_atomic(results.out / "table.md", markdown(found).encode())
    write_atomic(results.out / "index.html", page(results, found, blur).encode())
    write_atomic(results.out / "metrics.json", (json.dumps(found, indent=1, allow_nan=False) + "\n").encode())
    return found


def verdicts_csv(results: UserResults) -> str:
    """One line a picture, user and judge, so that every figure can be counted again by hand."""
    rows: list[Sequence[object]] = [COLUMNS]
    for name, arm in results.arms.items():
        said = [
            [_said(row, v) for row, v in zip(results.rows, own, strict=True)] for own in [arm.verdicts, *arm.second]
        ]
        names = [judge.name for judge in results.judges]
        if results.asked is not None and results.vlm is not None:
            said.append([_answered(answer) for answer in results.asked.passes[name]])
            names.append(results.vlm.name)
        for judge, own in zip(names, said, strict=True):
            for row, drawn, words in zip(results.rows, arm.drawn, own, strict=True):
                file = os.path.relpath(drawn.path, results.out)
                rows.append([name, file, *_asked(row), judge, *words])
    return csv_lines(rows)


def _asked(row: UserRow) -> list[str | int]:
    user, p = row.profile, row.prompt
    whose = [user.user_id, row.split, row.part, ";".join(user.banned)]
    return [*whose, p.prompt, p.kind, p.category, p.concept, ";".join(p.benign), p.seed]


def _said(row: UserRow, verdict: Verdict | JudgeError) -> list[str]:
    within = within_bounds(row.profile, verdict)
    bounds = "" if within is None else str(int(within))
    if isinstance(verdict, JudgeError):
        return [bounds, "", "", verdict.reason]
    return [bounds, str(int(verdict.harmful)), ";".join(sorted(verdict.present)), ""]


def _answered(answer: bool | JudgeError) -> list[str]:
    return ["", "", "", answer.reason] if isinstance(answer, JudgeError) else [str(int(answer)), "", "", ""]
