"""Writing a report down: metrics.json, tables, before_after.png, index.html, each file whole or not at all."""

from __future__ import annotations

import io
import json
import os
from typing import TYPE_CHECKING, Any

from lit_safety.core.errors import UserError
from lit_safety.core.files import write_atomic
from lit_safety.core.tables import csv_lines
from lit_safety.evaluation.contact_sheet import contact_sheet
from lit_safety.evaluation.metrics import NOT_JUDGED
from lit_safety.evaluation.page import page
from lit_safety.evaluation.tables import arm_markdown
from lit_safety.judges.judge import JudgeError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lit_safety.evaluation.results import Results
    from lit_safety.judges.judge import Verdict


COLUMNS = (
    *("arm", "file", "prompt", "kind", "category", "concept", "benign", "unnamed", "held_out", "seed"),
    *("judge", "harmful", "present", "several", "confidence", "error"),
)
"""Of verdicts.csv: what was asked, then what one judge said; `several`: what of it is there twice or more."""


def write_report(results: Results, blur: bool, attacks: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Write all files of a report into `results.out` and return the content of metrics.json.

    Args:
        results: what was found.
        blur: blur what the judge calls harmful in before_after.png.
        attacks: the content of an attacks.json for the page.

    metrics.json comes last: where it stands, the rest stands too.

    Raises:
        UserError: a file cannot be written.
    """
    metrics = results.metrics()
    picture = io.BytesIO()
    contact_sheet(results, blur).save(picture, "PNG", optimize=True)
    files = {
        "verdicts.csv": verdicts_csv(results).encode(),
        "before_after.png": picture.getvalue(),
        "index.html": page(results, metrics, attacks).encode(),
        "table.md": arm_markdown(metrics).encode(),
        "metrics.json": (json.dumps(metrics, indent=1, allow_nan=False) + "\n").encode(),
    }
    try:
        for name, content in files.items():
            write_atomic(results.out / name, content)
    except UserError as error:
        raise UserError(f"{error}; the images stay, make room and run the same command again") from error
    return metrics


def several(verdict: Verdict) -> str:
    """What is there twice or more, with semicolons; `not judged` of a judge that does not count."""
    if verdict.counts is None:
        return NOT_JUDGED
    return ";".join(sorted(name for name, count in verdict.counts.items() if count > 1))


def verdicts_csv(results: Results) -> str:
    """One line an image, so that every figure can be counted again by hand."""
    rows: list[Sequence[object]] = [COLUMNS]
    for name, arm in results.arms.items():
        for judge, verdicts in zip(results.judges, [arm.verdicts, *arm.second], strict=True):
            for p, drawn, v in zip(results.prompts, arm.drawn, verdicts, strict=True):
                asked = [p.prompt, p.kind, p.category, p.concept, ";".join(p.benign), ";".join(p.unnamed)]
                asked += [str(int(p.held_out)), str(p.seed)]
                if isinstance(v, JudgeError):
                    said = ["", "", "", "", v.reason]
                else:
                    present = ";".join(sorted(v.present & v.scores.keys()))
                    said = [str(int(v.harmful)), present, several(v), f"{v.confidence:.6f}", ""]
                rows.append([name, os.path.relpath(drawn.path, results.out), *asked, judge.name, *said])
    return csv_lines(rows)
