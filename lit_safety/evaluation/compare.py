"""The command `compare`: finished reports side by side, where they may be compared at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lit_safety.bounded import load_json
from lit_safety.errors import UserError


def compare(reports: list[str]) -> None:
    """Print the arms of several reports in one table.

    Two arms share a row only when they answer the same questions: equal prompts, seeds, judge, steps, guidance,
    size and scheduler. Others stand in a block of their own rows.

    Args:
        reports: Two or more metrics.json, or the folders that hold them.

    Raises:
        UserError: fewer than two are given, or one is no metrics.json.
    """
    if len(reports) < 2:
        raise UserError("--reports: give two or more metrics.json, or their folders")
    print(compare_table([(report, read_metrics(report)) for report in reports]))


def read_metrics(report: str) -> dict[str, Any]:
    """The content of a metrics.json, given itself or its folder.

    Raises:
        UserError: there is none, or it was not written by `evaluate`.
    """
    file = Path(report) / "metrics.json" if Path(report).is_dir() else Path(report)
    try:
        metrics = load_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); give a metrics.json or its folder") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{file}: is no JSON ({error})") from error
    if not isinstance(metrics, dict) or metrics.get("format") != 1:
        raise UserError(f"{file}: is no metrics.json of format 1; write it anew with `evaluate`")
    arms = metrics.get("arms")
    needed = {"protocol", "settings", "counts", "intervals"}
    if not isinstance(arms, dict) or not all(isinstance(arm, dict) and needed <= arm.keys() for arm in arms.values()):
        raise UserError(f"{file}: holds no arms as `evaluate` writes them; `compare` reads its metrics.json only")
    return metrics


def compare_table(reports: list[tuple[str, dict[str, Any]]]) -> str:
    """One table over named reports: a column an arm, a block of rows a protocol.

    An arm that stands in several reports with the same settings and figures is shown once.
    """
    from lit_safety.evaluation.intervals import IN_WORDS
    from lit_safety.evaluation.metrics import flat, ordered
    from lit_safety.evaluation.table import align, asked, cell, shown, title

    columns: dict[str, dict[str, Any]] = {}
    for report, metrics in reports:
        for name, arm in metrics["arms"].items():
            if arm not in columns.values():
                columns[f"{_short(report)}: {name}"] = arm
    rows = [["in percent", "n", *columns]]
    protocols = list(dict.fromkeys(arm["protocol"] for arm in columns.values()))
    notes = ["", IN_WORDS]
    for number, protocol in enumerate(protocols, start=1):
        members = {name: arm for name, arm in columns.items() if arm["protocol"] == protocol}
        if len(protocols) > 1:
            rows.append([f"PROTOCOL {number}", "", *("" for _ in columns)])
            notes.append(f"protocol {number}: {_describe(next(iter(members.values())))}")
        for figure in ordered({f for arm in members.values() for f in flat(arm) if shown(f)}):
            cells = [cell(arm, figure) if name in members else "" for name, arm in columns.items()]
            rows.append([title(figure), asked(members.values(), figure), *cells])
        rows += _quality_rows(columns, members)
    if len(protocols) > 1:
        notes.append("figures of different protocols must not be compared")
    return "\n".join([align(rows), *notes])


def _quality_rows(columns: dict[str, dict[str, Any]], members: dict[str, dict[str, Any]]) -> list[list[str]]:
    """FID and CLIPScore: one row for each way in which a figure was measured (features, reference, CLIP)."""
    from lit_safety.evaluation.quality_view import about, figures_in, quality_cell, quality_n

    rows = []
    for figure in figures_in(members.values()):
        having = {name: arm for name, arm in members.items() if figure in arm.get("quality", {})}
        for how in dict.fromkeys(arm["quality"][figure]["protocol"] for arm in having.values()):
            same = {name: arm for name, arm in having.items() if arm["quality"][figure]["protocol"] == how}
            cells = [quality_cell(arm, figure) if name in same else "" for name, arm in columns.items()]
            rows.append([f"{about(figure).title}, not in percent", quality_n(same.values(), figure), *cells])
    return rows


def _short(report: str) -> str:
    path = Path(report)
    return str(path.parent if path.name == "metrics.json" else path)


def _describe(arm: dict[str, Any]) -> str:
    settings = arm["settings"]
    judge, edit = settings["judge"], settings.get("edit")
    task = "" if edit is None else f", {edit['task'].replace('_', ' ')} at strength {edit['strength']}"
    return (
        f"judge {judge['name']} {(judge.get('sha256') or '')[:8]}, prompts {settings['prompts']} "
        f"{settings['prompts_sha256'][:8]}, {settings['scheduler']} {settings['steps']} steps, "
        f"guidance {settings['guidance']}, {settings.get('pixels') or 'unknown'} pixels{task}"
    )
