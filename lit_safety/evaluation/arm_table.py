"""The main figures with a row an arm: table.md for a document, and the same at the top of the page."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from lit_safety.evaluation.metrics import flat
from lit_safety.evaluation.quality_view import about, figures_in, quality_cell
from lit_safety.evaluation.table import cell, judged_over, title

if TYPE_CHECKING:
    from collections.abc import Mapping

MAIN = (
    *("ip", "ip_implicit/seen", "ip_implicit/held_out", "asr/post", "clean_harm_rate"),
    *("benign_recall", "benign_recall_two", "benign_recall_lookalike", "benign_recall_on_harmful"),
)
"""The shares that the table holds, where they were measured."""


def arm_rows(metrics: Mapping[str, Any]) -> list[list[str]]:
    """The heading, then a row an arm: shares in percent and quality figures, each with its interval in brackets."""
    arms = metrics["arms"]
    shares = [figure for figure in MAIN if any(figure in flat(arm) for arm in arms.values())]
    quality = figures_in(arms.values())
    rows = [["arm", *(title(figure) for figure in shares), *(about(figure).title for figure in quality)]]
    for name, arm in arms.items():
        cells = [cell(arm, figure) for figure in shares] + [quality_cell(arm, figure) for figure in quality]
        rows.append([name, *cells])
    return rows


def arm_markdown(metrics: Mapping[str, Any]) -> str:
    """table.md: the rows, and below them the protocol that they share."""
    head, *rows = [[text.replace("|", "\\|") for text in row] for row in arm_rows(metrics)]
    lines = [head, ["---"] * len(head), *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\n{protocol_line(metrics)}\n"


def protocol_line(metrics: Mapping[str, Any]) -> str:
    """One sentence with whatever decides the figures: judge, prompts, seeds, steps, guidance."""
    s = metrics["settings"]
    drawn = ", ".join(f"{count} {kind}" for kind, count in s.get("drawn", {}).items())
    edit = s.get("edit")
    judge = s["judge"]
    task = f"; {edit['task'].replace('_', ' ')} at strength {edit['strength']}" if edit else ""
    return (
        f"Shares in percent, 95% intervals (Wilson) in brackets. Judge {judge['name']} "
        f"({str(judge.get('sha256') or 'no weights')[:10]}, threshold {judge.get('threshold', 'its own')}); "
        f"prompts {s.get('prompts')} ({str(s.get('prompts_sha256'))[:8]}): {drawn}; {s.get('scheduler')}, "
        f"{s.get('steps')} steps, guidance {s.get('guidance')}{task}; the same prompts and seeds in every row."
        + (f" {over[0].upper()}{over[1:]}." if (over := judged_over(metrics)) else "")
    )


def arm_html(metrics: Mapping[str, Any]) -> str:
    """The table of the page; empty for one or two arms, which the tiles above already show."""
    if len(metrics["arms"]) < 3:
        return ""
    head, *rows = arm_rows(metrics)
    top = "".join(f"<th scope=col>{escape(text)}</th>" for text in head)
    lines = []
    for name, *cells in rows:
        shown = "".join(f"<td>{escape(text).replace(' [', ' <span>[').replace(']', ']</span>')}</td>" for text in cells)
        lines.append(f"<tr><th scope=row>{escape(name)}</th>{shown}</tr>")
    return (
        f"<h2>All arms</h2><p class=soft>{escape(protocol_line(metrics))}</p><div class=scroll tabindex=0 role=region "
        f'aria-label="Main figures of all arms"><table class=arms><tr>{top}</tr>{"".join(lines)}</table></div>'
    )
