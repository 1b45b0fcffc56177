"""Figures side by side as text: one row a figure, one column an arm, intervals in brackets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lit_safety.evaluation.intervals import IN_WORDS
from lit_safety.evaluation.metrics import FIGURES, NOT_JUDGED, flat, ordered
from lit_safety.evaluation.quality_view import quality_rows

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

BRIEF = tuple(name for name in FIGURES if name != "concept_recall_implicit")
"""Figures that the terminal shows; the rest stand in metrics.json and on the page."""


def report_table(metrics: Mapping[str, Any]) -> str:
    """The table of one metrics.json: every arm, and for each arm but the base its difference to the base."""
    arms: Mapping[str, Any] = metrics["arms"]
    changes: Mapping[str, Any] = metrics["differences"]
    names = [name for name in ordered({n for arm in arms.values() for n in flat(arm)}) if shown(name)]
    against = list(changes) if len(arms) <= 3 else []  # with more arms the lines would not fit a terminal
    rows = [["in percent", "n", *arms, *(f"{name} - base" for name in against)]]
    for name in names:
        cells = [cell(arm, name) for arm in arms.values()]
        rows.append(
            [
                title(name),
                asked(arms.values(), name),
                *cells,
                *(change(flat(changes[other]).get(name)) for other in against),
            ]
        )
    if any(arm["errors"] for arm in arms.values()):
        rows.append(
            ["PICTURES WITHOUT A VERDICT", "", *(str(arm["errors"]) for arm in arms.values()), *("" for _ in against)]
        )
    n = next(iter(arms.values()))["n"]
    quality = quality_rows(metrics)
    below = f"\n\n{align(quality)}" if quality else ""
    over = "".join(f"\n{line}" for line in [judged_over(metrics)] if line)
    return f"{align(rows)}{below}\n\n{n} pictures an arm; {IN_WORDS}, in points{over}"


def judged_over(metrics: Mapping[str, Any]) -> str:
    """Which categories the figures of harm are over, and which images are not judged; empty where all are."""
    return over_categories(metrics["settings"].get("judge"), metrics["arms"].values())


def over_categories(judge: object, arms: Iterable[Mapping[str, Any]]) -> str:
    """The same of some arms, of which those of older reports do not say."""
    blind: dict[str, int] = {}
    for arm in arms:
        if isinstance(arm.get("not_judged"), dict):
            blind |= arm["not_judged"]
    if not blind or not isinstance(judge, dict):
        return ""
    seen = ", ".join(judge.get("categories", ())) or "no category"
    left = ", ".join(f"{category} ({count} images)" for category, count in blind.items())
    return f"harm is counted over {seen}; not judged, for {judge.get('name')} does not see it: {left}"


def shown(name: str) -> bool:
    """Whether the terminal shows a figure: recall by category would double the table."""
    figure, _, part = name.partition("/")
    return figure in BRIEF and not (figure == "concept_recall" and part != "all")


def title(name: str) -> str:
    """`ip_by_category/self-harm` -> `  self-harm`; a figure without parts or its part `all` -> the full title."""
    figure, _, part = name.partition("/")
    if figure == "ip_by_category":
        return f"  {part}"
    return FIGURES[figure].title + (f", {part.replace('_', ' ')}" if part not in ("", "all") else "")


def cell(arm: Mapping[str, Any], name: str) -> str:
    """`61.2 [56.3, 65.9]`, with the errors where there are any; a dash where the arm has no such figure."""
    counts = flat(arm["counts"]).get(name)
    if counts is None:
        return NOT_JUDGED if flat(arm).get(name) == NOT_JUDGED else "-"
    value, (low, high) = flat(arm)[name], flat(arm["intervals"])[name]
    errors = f" +{counts['errors']} errors" if counts["errors"] else ""
    return f"{percent(value)} [{percent(low)}, {percent(high)}]{errors}"


def asked(arms: Iterable[Mapping[str, Any]], name: str) -> str:
    """Of how many pictures a figure is the share, errors included; the same for all arms of a protocol."""
    found = (flat(arm["counts"]).get(name) for arm in arms)
    return next((str(counts["n"] + counts["errors"]) for counts in found if counts), "-")


def percent(share: float | str | None) -> str:
    """`0.612` -> `61.2`; `none` where no picture was answered; `not judged` stays."""
    if isinstance(share, str):
        return share
    return "none" if share is None else f"{100 * share:.1f}"


def change(difference: Mapping[str, Any] | None) -> str:
    """`-58.0 [-63.1, -52.4]`."""
    if difference is None:
        return "-"
    value, (low, high) = difference["value"], difference["interval"]
    return ("none" if value is None else f"{100 * value:+.1f}") + f" [{100 * low:+.1f}, {100 * high:+.1f}]"


def align(rows: Sequence[Sequence[str]]) -> str:
    """Columns under each other, a rule below the first row."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
