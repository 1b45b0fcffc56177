"""FID, CLIPScore and preference scores as text and as HTML: a row a figure, a column or line an arm."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from lit_safety.evaluation.metrics import Figure

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

QUALITY: dict[str, Figure] = {
    "fid_base": Figure(
        "FID to the base",
        "distance between the features of the arm's and of the base's pictures of clean prompts, same seeds",
        "lower",
    ),
    "fid_reference": Figure(
        "FID to the reference", "distance between the features of pictures of clean prompts and of --reference", "lower"
    ),
    "clip_score": Figure(
        "CLIPScore", "100 x cosine between the CLIP vectors of a picture and its clean prompt, on average", "higher"
    ),
}
"""What `quality.Quality` measures; FIDs of unequal n, or of other features, must not be compared."""


def about(figure: str) -> Figure:
    """How a quality figure is shown; `preference/NAME` is a scorer's."""
    if figure in QUALITY:
        return QUALITY[figure]
    name = figure.partition("/")[2]
    return Figure(name, f"{name}'s score of a picture of a clean prompt, on average", "higher")


def quality_rows(metrics: Mapping[str, Any]) -> list[list[str]]:
    """The rows of one metrics.json, the heading first; none where quality was not measured."""
    arms = metrics["arms"]
    against = list(metrics["differences"]) if len(arms) <= 3 else []
    rows = [["quality", "n", *arms, *(f"{name} - base" for name in against)]]
    for figure in figures_in(arms.values()):
        cells = [quality_cell(arm, figure) for arm in arms.values()]
        changes = [metrics["differences"][name].get("quality", {}).get(figure) for name in against]
        shifts = ["-" if change is None else _number(change, sign="+") for change in changes]
        rows.append([about(figure).title, quality_n(arms.values(), figure), *cells, *shifts])
    return rows if len(rows) > 1 else []


def figures_in(arms: Iterable[Mapping[str, Any]]) -> list[str]:
    """The quality figures that any of the arms has, in the order of `QUALITY`, preference scores after them."""
    found = {figure for arm in arms for figure in arm.get("quality", {})}
    return [figure for figure in QUALITY if figure in found] + sorted(found - QUALITY.keys())


def quality_cell(arm: Mapping[str, Any], figure: str) -> str:
    """`12.31 [10.20, 14.42]`, with the errors where there are any; a dash where the arm has no such figure."""
    entry = arm.get("quality", {}).get(figure)
    if entry is None:
        return "-"
    return _number(entry) + (f" +{entry['errors']} errors" if entry["errors"] else "")


def quality_n(arms: Iterable[Mapping[str, Any]], figure: str) -> str:
    """Of how many pictures an arm's figure is, errors included."""
    found = [arm["quality"][figure] for arm in arms if figure in arm.get("quality", {})]
    return str(found[0]["n"] + found[0]["errors"]) if found else "-"


def quality_html(metrics: Mapping[str, Any]) -> str:
    """The section of the page; empty where quality was not measured."""
    arms = metrics["arms"]
    html = []
    for figure in figures_in(arms.values()):
        shown = about(figure)
        lines = []
        for name, arm in arms.items():
            if figure not in arm.get("quality", {}):
                continue
            shift = metrics["differences"].get(name, {}).get("quality", {}).get(figure)
            lines.append(
                f"<tr><th scope=row>{escape(name)}</th><td class=num>{escape(quality_cell(arm, figure))}</td>"
                f"<td class=diff>{_coloured(shift, shown.better) if shift else ''}</td></tr>"
            )
        html.append(
            f"<section class=figure><h3>{escape(shown.title)}</h3><p>{escape(shown.meaning[0].upper())}"
            f"{escape(shown.meaning[1:])}. {shown.better.capitalize()} is better.</p><table><caption>"
            f"{quality_n(arms.values(), figure)} pictures an arm</caption>{''.join(lines)}</table></section>"
        )
    note = "<p class=soft>FID is biased upwards in small sets: compare it at equal n only.</p>"
    return f"<h2>Quality</h2>{note}{''.join(html)}" if html else ""


def _coloured(shift: Mapping[str, Any], better: str) -> str:
    colour = "soft"
    if shift["interval"] is not None and not shift["interval"][0] <= 0 <= shift["interval"][1]:
        colour = "up" if (shift["interval"][0] > 0) == (better == "higher") else "down"
    return f"<span class={colour}>{_number(shift, sign='+')} against the base</span>"


def _number(entry: Mapping[str, Any], sign: str = "") -> str:
    if entry["value"] is None:
        return "none"
    text = f"{entry['value']:{sign}.2f}"
    if entry["interval"] is None:
        return text
    low, high = entry["interval"]
    return f"{text} [{low:{sign}.2f}, {high:{sign}.2f}]"
