"""The figures of an evaluation for users as text and as Markdown: a block a split, a row a figure, a column an arm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lit_safety.evaluation.table import align, percent
from lit_safety.evaluation.user_answers import FIGURES
from lit_safety.evaluation.user_run import BASE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

KINDS = ("preservation", "suppression")


def splits_of(metrics: Mapping[str, Any]) -> list[str]:
    """seen, unseen, all, or whatever splits there are."""
    about = set(FIGURES)
    base = metrics["arms"][BASE]
    return [name for name, part in base.items() if isinstance(part, dict) and about & part.keys()]


def user_table(metrics: Mapping[str, Any]) -> str:
    """For the terminal: by the judge that decides, and by the vision-language model where one was asked."""
    found = [align(rows_of(metrics))]
    if "user_judge" in metrics:
        found.append(f"by {metrics['user_judge']['settings']['name']}:\n" + align(rows_of(metrics["user_judge"])))
    errors = {name: arm["errors"] for name, arm in metrics["arms"].items() if arm["errors"]}
    if errors:
        found.append("PICTURES WITHOUT A VERDICT: " + ", ".join(f"{name} {count}" for name, count in errors.items()))
    found.append(
        "percent; 95% intervals in brackets, users as groups; Win Rate: psa against each arm, ties in the denominator"
    )
    return "\n\n".join(found)


def markdown(metrics: Mapping[str, Any]) -> str:
    """table.md: the same rows."""
    blocks = []
    for title, part in (("", metrics), ("By the vision-language model", metrics.get("user_judge"))):
        if part is None:
            continue
        head, *rows = rows_of(part)
        lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
        blocks.append("\n".join([f"{title}\n"] * bool(title) + lines))
    return "\n\n".join(blocks) + "\n"


def rows_of(metrics: Mapping[str, Any]) -> list[list[str]]:
    """The table's cells, the head first."""
    arms: Mapping[str, Any] = metrics["arms"]
    rows = [["", "n", *arms]]
    splits = splits_of(metrics)
    for split in splits[:-1] or splits:  # all together stands in metrics.json and on the page
        for figure in FIGURES:
            first = arms[BASE][split].get(figure)
            if first is not None:
                n = str(first["n"] + first["errors"])
                cells = [cell(arm[split].get(figure)) for arm in arms.values()]
                rows.append([f"{split}: {FIGURES[figure].title}", n, *cells])
        rows += _wins(metrics, split, list(arms))
    return rows


def _wins(metrics: Mapping[str, Any], split: str, arms: Sequence[str]) -> list[list[str]]:
    found = []
    for kind in KINDS:
        of = {name: won[split][kind] for name, won in metrics["wins"].items() if kind in won[split]}
        if of:
            n = next(str(one["n"] + one["errors"]) for one in of.values())
            found.append([f"{split}: Win Rate, {kind}", n, *(cell(of.get(name)) for name in arms)])
    return found


def cell(share: Mapping[str, Any] | None) -> str:
    """`61.2 [56.3, 65.9]`, with the errors where there are any; a dash where there is no such figure."""
    if share is None:
        return "-"
    low, high = share["interval"]
    errors = f" +{share['errors']} errors" if share["errors"] else ""
    return f"{percent(share['value'])} [{percent(low)}, {percent(high)}]{errors}"
