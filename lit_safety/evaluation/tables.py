"""FID, CLIPScore and preference scores as text and for the page: a row a figure, a column or line an arm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lit_safety.core.intervals import IN_WORDS
from lit_safety.evaluation.metrics import ALWAYS, FIGURES, NOT_MEASURED, WHERE, Figure, flat, ordered
from lit_safety.report.page import Bar, Bars, Block, Heading, Table, Text
from lit_safety.report.page import Figure as PageFigure

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


QUALITY: dict[str, Figure] = {
    "fid_base": Figure(
        "FID to the base",
        "Fr\u00e9chet distance of a network's features between two sets of images, 0 where they look alike: here the "
        "arm's and the base's images of clean prompts, same seeds",
        "lower",
    ),
    "fid_reference": Figure(
        "FID to the reference",
        "the same distance between the arm's images of clean prompts and the images that --reference names, which no "
        "arm drew; the base has one too, and an arm should not be further away than the base",
        "lower",
    ),
    "clip_score": Figure(
        "CLIPScore", "100 x cosine between the CLIP vectors of an image and its clean prompt, on average", "higher"
    ),
}
"""What `quality.Quality` measures; FIDs of unequal n, or of other features, must not be compared."""


def about(figure: str) -> Figure:
    """How a quality figure is shown; `preference/NAME` is a scorer's."""
    if figure in QUALITY:
        return QUALITY[figure]
    name = figure.partition("/")[2]
    return Figure(name, f"{name}'s score of an image of a clean prompt, on average", "higher")


def quality_rows(metrics: Mapping[str, Any]) -> list[list[str]]:
    """The rows of one metrics.json, the heading first; empty if quality was not measured."""
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
    """Of how many images an arm's figure is, errors included."""
    found = [arm["quality"][figure] for arm in arms if figure in arm.get("quality", {})]
    return str(found[0]["n"] + found[0]["errors"]) if found else "-"


def quality_blocks(metrics: Mapping[str, Any]) -> list[Block]:
    """The section of the page; empty if quality was not measured."""
    arms = metrics["arms"]
    figures = []
    for figure in figures_in(arms.values()):
        shown = about(figure)
        bars = []
        for name, arm in arms.items():
            if figure in arm.get("quality", {}):
                shift = metrics["differences"].get(name, {}).get("quality", {}).get(figure)
                note = f"{_number(shift, sign='+')} against the base" if shift else ""
                bars.append(Bar(name, quality_cell(arm, figure), note=note, tone=_tone(shift, shown.better)))
        text = f"{shown.meaning[0].upper()}{shown.meaning[1:]}. {shown.better.capitalize()} is better."
        if figure == "fid_reference" and (reference := _reference(metrics)):
            text += f" The reference here: {reference}."
        figures.append(PageFigure(shown.title, text, [Bars(f"{quality_n(arms.values(), figure)} images an arm", bars)]))
    if not figures:
        return []
    note = "FID is biased upwards in small sets: compare it at equal n only."
    return [Heading("Quality"), Text(note, soft=True), *figures]


def _reference(metrics: Mapping[str, Any]) -> str | None:
    """The folder of the images that FID compares with, and their number."""
    found: Any = metrics.get("settings")
    for key in ("quality", "fid", "reference"):
        found = found.get(key) if isinstance(found, dict) else None
    return f"{found.get('path')}, {found.get('n')} images" if isinstance(found, dict) else None


def _tone(shift: Mapping[str, Any] | None, better: str) -> str:
    if not shift or shift["interval"] is None or shift["interval"][0] <= 0 <= shift["interval"][1]:
        return "soft"
    return "up" if (shift["interval"][0] > 0) == (better == "higher") else "down"


def _number(entry: Mapping[str, Any], sign: str = "") -> str:
    if entry["value"] is None:
        return "none"
    text = f"{entry['value']:{sign}.2f}"
    if entry["interval"] is None:
        return text
    low, high = entry["interval"]
    return f"{text} [{low:{sign}.2f}, {high:{sign}.2f}]"


# Figures side by side as text: one row a figure, one column an arm, intervals in brackets.


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
            ["IMAGES WITHOUT A VERDICT", "", *(str(arm["errors"]) for arm in arms.values()), *("" for _ in against)]
        )
    n = next(iter(arms.values()))["n"]
    quality = quality_rows(metrics)
    below = f"\n\n{align(quality)}" if quality else ""
    if right := corrected_rows(metrics):
        below += f"\n\n{align(right)}"
    said = (protocol_followed(metrics), judged_over(metrics), drawn_elsewhere(metrics))
    over = "".join(f"\n{line}" for line in said if line)
    return f"{align(rows)}{below}\n\n{n} images an arm; {IN_WORDS}, in points{over}"


def corrected_rows(metrics: Mapping[str, Any]) -> list[list[str]]:
    """Rates of harm as the judge found them, and corrected for its errors, the heading first; none without an audit."""
    arms = {name: arm for name, arm in metrics["arms"].items() if arm.get("corrected")}
    names = [name for name in ordered({n for arm in arms.values() for n in flat(arm["corrected"])}) if shown(name)]
    rows = [["corrected for the judge's errors", "n", *metrics["arms"]]]
    for name in names:
        cells = [corrected_cell(arm, name) for arm in metrics["arms"].values()]
        rows.append([title(name), asked(metrics["arms"].values(), name), *cells])
    return rows if names else []


def corrected_cell(arm: Mapping[str, Any], name: str) -> str:
    """`12.3 [8.0, 17.1]`; `not better than a coin` where the judge was not; a dash where nothing was corrected."""
    found = flat(arm.get("corrected", {})).get(name)
    if found is None:
        return "-"
    if found["value"] is None:
        return "none: the judge is no better than a coin"
    low, high = found["interval"]
    return f"{percent(found['value'])} [{percent(low)}, {percent(high)}]"


def protocol_followed(metrics: Mapping[str, Any]) -> str:
    """`protocol safetydpo-i2p (1a2b3c4d)`, with what deviates from it; empty where none is named."""
    named = metrics["settings"].get("protocol")
    if named is None:
        return ""
    said = f"protocol {named['name']} ({named['sha256'][:8]}): {named['title']}"
    if named["deviations"]:
        said += f". NOT as the protocol says: {', '.join(named['deviations'])}"
    return said


def judged_over(metrics: Mapping[str, Any]) -> str:
    """Which categories the figures of harm are over, and which images are not judged; empty where all are."""
    return over_categories(metrics["settings"].get("judge"), metrics["arms"].values())


def drawn_elsewhere(metrics: Mapping[str, Any]) -> str:
    """Which arms are images of another program; empty if there are none."""
    settings = {name: arm.get("settings", {}) for name, arm in metrics["arms"].items()}
    given = {name: said for name, said in settings.items() if said.get("drawn_by")}
    return "; ".join(f"{name}: images of {own['drawn_by']}, seeds {own['seeds']}" for name, own in given.items())


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
    return f"harm is counted over {seen}; not judged, because {judge.get('name')} does not see it: {left}"


def shown(name: str) -> bool:
    """Whether the terminal shows a figure: recall by category or by kind of prompt would double the table."""
    figure, _, part = name.partition("/")
    if part in WHERE and part not in ("harmless", "harmful"):
        return False
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
        value = flat(arm).get(name)  # a report of an earlier version has none of what every report has
        return value if isinstance(value, str) else NOT_MEASURED if name in ALWAYS else "-"
    value, (low, high) = flat(arm)[name], flat(arm["intervals"])[name]
    errors = f" +{counts['errors']} errors" if counts["errors"] else ""
    return f"{percent(value)} [{percent(low)}, {percent(high)}]{errors}"


def asked(arms: Iterable[Mapping[str, Any]], name: str) -> str:
    """Of how many images a figure is the share, errors included; the same for all arms of a protocol."""
    found = (flat(arm["counts"]).get(name) for arm in arms)
    return next((str(counts["n"] + counts["errors"]) for counts in found if counts), "-")


def percent(share: float | str | None) -> str:
    """`0.612` -> `61.2`; `none` where no image was answered; `not judged` stays."""
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


# The main figures with a row an arm: table.md for a document, and the same at the top of the page.


MAIN = (
    *("ip", "ip_held_out", "ip_implicit/seen", "ip_implicit/held_out", "asr/post"),
    *("any_of/explicit", "any_of/implicit", "any_of/adversarial", "clean_harm_rate"),
    *("named_recall/harmless", "unnamed_recall/harmless", "miscounted/harmless"),
    *("questions/all", "questions/count", "questions/colour", "questions/place"),
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
    table = _markdown(lines)
    if right := corrected_rows(metrics):
        table += f"\n\n{_markdown([right[0], ['---'] * len(right[0]), *right[1:]])}"
    return f"{table}\n\n{protocol_line(metrics)}\n"


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def protocol_line(metrics: Mapping[str, Any]) -> str:
    """One sentence with everything that decides the figures: judge, prompts, seeds, steps, guidance."""
    s = metrics["settings"]
    drawn = ", ".join(f"{count} {kind}" for kind, count in s.get("drawn", {}).items())
    edit = s.get("edit")
    judge = s["judge"]
    but = " that was drawn here" if drawn_elsewhere(metrics) else ""
    task = f"; {edit['task'].replace('_', ' ')} at strength {edit['strength']}" if edit else ""
    return (
        f"Shares in percent, 95% intervals (Wilson) in brackets. Judge {judge['name']} "
        f"({str(judge.get('sha256') or 'no weights')[:10]}, threshold {judge.get('threshold', 'its own')}"
        f"{_half(judge)}); prompts {s.get('prompts')} ({str(s.get('prompts_sha256'))[:8]}): {drawn}; "
        f"{s.get('scheduler')}, {s.get('steps')} steps, guidance {s.get('guidance')}{task}; "
        f"the same prompts and seeds in every row{but}."
        + (f" {followed[0].upper()}{followed[1:]}." if (followed := protocol_followed(metrics)) else "")
        + (f" {s['any_of']} seeds a prompt that asks for harm." if s.get("any_of") else "")
        + (f" {over[0].upper()}{over[1:]}." if (over := judged_over(metrics)) else "")
        + (f" {given}." if (given := drawn_elsewhere(metrics)) else "")
    )


def _half(judge: Mapping[str, Any]) -> str:
    """The number formats below float32 in which a judge, or its members, computed."""
    formats = {one.get("precision", "float32") for one in (judge, *judge.get("members", ()))} - {"float32"}
    return f", in {' and '.join(sorted(formats))}" if formats else ""


def arm_blocks(metrics: Mapping[str, Any]) -> list[Block]:
    """The table of the page; empty for one or two arms, which the tiles above already show."""
    if len(metrics["arms"]) < 3:
        return []
    head, *rows = arm_rows(metrics)
    return [
        Heading("All arms"),
        Text(protocol_line(metrics), soft=True),
        Table(head, rows, "Main figures of all arms"),
    ]
