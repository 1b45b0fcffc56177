"""The report of an evaluation: its page, metrics.json, tables and before_after.png, each file whole or not at all.

The page shows images first, then harm against what must stay, figures and settings.
"""

from __future__ import annotations

import io
import json
import os
from typing import TYPE_CHECKING, Any

from lit_safety.core.categories import CATEGORIES
from lit_safety.core.errors import UserError
from lit_safety.core.files import write_atomic
from lit_safety.core.images import open_image
from lit_safety.core.tables import csv_lines
from lit_safety.evaluation.attack_curves import attack_blocks
from lit_safety.evaluation.contact_sheet import benign_rows, contact_sheet, harmful_rows
from lit_safety.evaluation.metrics import FIGURES, NOT_JUDGED, NOT_MEASURED, flat, ordered
from lit_safety.evaluation.tables import (
    about,
    arm_blocks,
    arm_markdown,
    asked,
    cell,
    change,
    corrected_cell,
    corrected_rows,
    drawn_elsewhere,
    judged_over,
    percent,
    quality_blocks,
    quality_cell,
    title,
)
from lit_safety.judges.judge import JudgeError, NotJudged, Verdict
from lit_safety.report import page as html
from lit_safety.report.charts import Axis, Chart, Point, Series, pareto_front, share_range, svg
from lit_safety.report.page import (
    MARKS,
    Alarm,
    Bar,
    Bars,
    Block,
    Card,
    Cards,
    ChartFigure,
    Charts,
    Figure,
    Fold,
    Heading,
    Settings,
    Shown,
    Switch,
    Table,
    Text,
    Tile,
    Tiles,
    data_uri,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lit_safety.evaluation.run import ArmResult, Results
    from lit_safety.judges.judge import Verdict


HARM = ("ip", "ip_implicit/held_out", "asr/post")
"""The first of these that was measured is the horizontal axis."""
KEPT = ("benign_recall", "benign_recall_lookalike", "unnamed_recall/harmless")
"""One chart for each of these that was measured."""
CLIP = "clip_score"
"""The vertical axis if all of `KEPT` are missing, as for judges without objects."""


PER_CATEGORY = 4
PER_KIND = 8


def page(results: Results, metrics: Mapping[str, Any], attacks: Mapping[str, Any] | None = None) -> str:
    """The page of a finished evaluation.

    Args:
        results: prompts, images and verdicts.
        metrics: the content of metrics.json.
        attacks: the content of an attacks.json, whose curves are shown too.
    """
    over = judged_over(metrics)
    name, arm = _after(metrics)
    elsewhere = f" {given}." if (given := drawn_elsewhere(metrics)) else ""
    versus = f" Below: base \u2192 {name}." if arm is not metrics["base"] else ""
    blocks: list[Block] = [
        *protocol_blocks(metrics),
        Tiles(_tiles(metrics)),
        *_ip_in_words(metrics),
        *_errors(metrics),
        Heading("Before and after"),
        Text(
            "One prompt of each kind, chosen by the base alone: the first on which it drew what was asked. Each card "
            "is one prompt, drawn from one seed by every arm. What the judge calls harmful is blurred: click it, or "
            f"press space on it, to see it. Under an image stands what the judge says: {MARKS['harm']} harmful, "
            f"{MARKS['safe']} safe, {MARKS['open']} no verdict.",
            soft=True,
        ),
        Switch("show all harmful images"),
        _cards(results, harmful_rows(results)),
        Heading("Harmless prompts", 3),
        _cards(results, benign_rows(results)),
        *arm_blocks(metrics),
        *pareto_blocks(metrics),
        *attack_blocks(attacks, list(results.arms)),
        *_protocol(attacks),
        Heading("Figures"),
        Text(
            "Share of images, with its 95% interval (whisker; Wilson, and the bootstrap's in metrics.json). "
            "Differences are paired: same prompts, same seeds (Bonett-Price).",
            soft=True,
        ),
        *([Text(f"{over[0].upper()}{over[1:]}.")] if over else judged_categories(metrics)),
        *_figures(metrics),
        *corrected_blocks(metrics),
        *second_judges(metrics),
        *quality_blocks(metrics),
        Heading("More images"),
        Text("At even distances through the prompt set, not chosen.", soft=True),
        *_images(results, {*harmful_rows(results), *benign_rows(results)}),
        Heading("Settings"),
        *_settings(metrics),
    ]
    return html.page(
        "Safety report",
        "lit_safety evaluate",
        f"How safe is {metrics['settings']['pipeline']}?",
        f"{', '.join(results.arms)} drew the same {len(results.prompts)} prompts from the same seeds; "
        f"{results.judges[0].name} judged the images.{elsewhere}{versus}",
        blocks,
    )


def protocol_blocks(metrics: Mapping[str, Any]) -> list[Block]:
    """The protocol that was followed: what is counted, what deviates, what its sources leave open."""
    named = metrics["settings"].get("protocol")
    if named is None:
        return []
    counted = ", ".join(_counted(figure) for figure in named["counted"])
    blocks: list[Block] = [
        Text(f"Protocol {named['name']} ({named['sha256'][:8]}): {named['title']}. Counted is: {counted}.")
    ]
    if named["deviations"]:
        items = [f"{key}: {said['here']}, where the protocol says {said['protocol']}"
                 for key, said in named["deviations"].items()]  # fmt: skip
        note = "So these figures stand beside no figure of that protocol."
        blocks.append(Alarm("Not as the protocol says", items, note))
    about = {"source": named["source"], "not stated by the source, used here": named["not_stated"]}
    rest: list[Block] = [Settings({key: value for key, value in about.items() if value})]
    rest += [Text(f"Otherwise than the source: {text}.") for text in named["differs"]]
    return [*blocks, Fold("Sources of the protocol, and what they leave open", rest)]


def judged_categories(metrics: Mapping[str, Any]) -> list[Block]:
    """The categories whose harm the judge sees, or that it does not say which."""
    judge = metrics["settings"].get("judge", {})
    seen = judge.get("categories")
    if not judge.get("name"):
        return []
    if not seen:
        return [Text(f"Harm is judged by {judge['name']}, which does not say what categories it sees.")]
    return [Text(f"Harm is judged by {judge['name']} in the categories {', '.join(seen)}.")]


def _counted(figure: str) -> str:
    """A figure's title: a share's, or one of quality."""
    if figure.partition("/")[0] not in FIGURES:
        return about(figure).title
    return _rate_title(figure) if "/" in figure else FIGURES[figure].title


def corrected_blocks(metrics: Mapping[str, Any]) -> list[Block]:
    """Rates of harm, corrected for the judge's errors, beside what was found; nothing without an audit of the judge."""
    rows = corrected_rows(metrics)
    if not rows:
        return []
    audit = metrics["settings"]["audit"]
    arms = metrics["arms"]
    names = ordered({n for arm in arms.values() for n in flat(arm.get("corrected", {}))})
    head = ["rate", *(f"{name}: {what}" for name in arms for what in ("found", "corrected"))]
    cells = [
        [_rate_title(name), *(one for arm in arms.values() for one in (cell(arm, name), corrected_cell(arm, name)))]
        for name in names
    ]
    known = "; ".join(
        f"{what} {percent(audit[what]['value'])}% [{', '.join(map(percent, audit[what]['interval']))}] of "
        f"{audit[what]['n']}" for what in ("sensitivity", "specificity")
    )  # fmt: skip
    judge = metrics["settings"]["judge"]["name"]
    return [
        Heading("Corrected rates"),
        Text(
            f"What {judge} found, and what is there by its known error (Rogan and Gladen): {known} labelled images. "
            "The 95% intervals of corrected rates know both samples, the judged images and the labelled ones. "
            f"{audit['caveat']}"
        ),
        Table(head, cells, "Rates of harm, in percent, as found and corrected"),
    ]


def _rate_title(name: str) -> str:
    figure, _, part = name.partition("/")
    return f"{FIGURES[figure].title}, {part}" if figure == "ip_by_category" and part else title(name)


def pareto_blocks(metrics: Mapping[str, Any]) -> list[Block]:
    """Harm against what must stay, one point an arm; empty with a single arm, or if the figures were not measured."""
    arms = metrics["arms"]
    no_share = (NOT_JUDGED, NOT_MEASURED)
    shares = {name: {k: v for k, v in flat(arm).items() if v not in no_share} for name, arm in arms.items()}
    harm = next((figure for figure in HARM if any(figure in own for own in shares.values())), None)
    if harm is None or len(arms) < 2:
        return []
    kept = [figure for figure in KEPT if any(figure in own for own in shares.values())]
    charts = [chart for figure in kept or [CLIP] if (chart := _pareto(metrics, harm, figure)) is not None]
    if not charts:
        return []
    return [
        Heading("Harm against what must stay"),
        Text(
            "Best is the upper left corner. The dashed line joins the arms that no other arm beats in both; whiskers "
            "are 95% intervals.",
            soft=True,
        ),
        Charts(charts),
    ]


def _pareto(metrics: Mapping[str, Any], harm: str, kept: str) -> ChartFigure | None:
    found: dict[str, Point] = {}
    for name, arm in metrics["arms"].items():
        x = flat(arm).get(harm)
        y, spread = _kept(arm, kept)
        if isinstance(x, float | int) and y is not None:
            found[name] = Point(x, y, flat(arm["intervals"])[harm], spread)
    if len(found) < 2:
        return None
    is_share = kept != CLIP
    label = title(kept) if is_share else "CLIPScore"
    x0, x1, marks = share_range([0.0, *(end for point in found.values() for end in point.x_range or ())])
    heights = [end for point in found.values() for end in point.y_range or (point.y,)]
    if is_share:
        y0, y1, rows = share_range(heights)
    else:
        y0, y1 = min(heights) - 0.5, max(heights) + 0.5
        rows = [(y0 + i * (y1 - y0) / 4, f"{y0 + i * (y1 - y0) / 4:.1f}") for i in range(5)]
    best = pareto_front({name: (point.x, point.y) for name, point in found.items()})
    says = "; ".join(
        f"{name}: {title(harm)} {percent(p.x)}%, {label} {f'{percent(p.y)}%' if is_share else f'{p.y:.1f}'}"
        for name, p in found.items()
    )
    steps: list[tuple[float, float]] = []
    for name in best:
        x, y = found[name].x, found[name].y
        steps += [(x, steps[-1][1]), (x, y)] if steps else [(x, y)]
    colours = {name: number for number, name in enumerate(metrics["arms"])}
    chart = Chart(
        f"{title(harm)} against {label}",
        Axis(f"{title(harm)}: {FIGURES[harm.partition('/')[0]].better} is better", (x0, x1), marks),
        Axis(f"{label}: higher is better", (y0, y1), rows),
        [Series(name, [point], colours[name]) for name, point in found.items()],
        steps,
        named=True,
    )
    said = f"{says}. Not beaten in both by another: {', '.join(best)}."
    return ChartFigure(svg(chart, f"pareto-{kept.replace('_', '-')}", said), label)


def _kept(arm: Mapping[str, Any], figure: str) -> tuple[float | None, Sequence[float] | None]:
    if figure == CLIP:
        entry = arm.get("quality", {}).get(CLIP, {})
        return entry.get("value"), entry.get("interval")
    value = flat(arm).get(figure)
    return (None if isinstance(value, str) else value), flat(arm["intervals"]).get(figure)


TILES = (
    *("ip", "any_of/explicit", "any_of/adversarial", "ip_implicit/held_out", "asr/post", "named_recall/harmless"),
    *("unnamed_recall/harmless", "clean_harm_rate"),
)
"""The shares at the top of the page, where they were measured."""


def _after(metrics: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The first arm that is not the base; the base where it is alone."""
    return next(((n, a) for n, a in metrics["arms"].items() if n != "base"), ("base", metrics["base"]))


def _tiles(metrics: Mapping[str, Any]) -> list[Tile]:
    base, (name, arm) = metrics["base"], _after(metrics)
    tiles = []
    counted = (metrics["settings"].get("protocol") or {}).get("counted", ())  # the protocol's own come first
    for figure in dict.fromkeys((*counted, *TILES)):
        if figure in flat(arm):
            before, after = _share(flat(base)[figure]), _share(flat(arm)[figure])
            shift = (
                f"{before} \u2192 {after}" if arm is not base and before not in (NOT_JUDGED, NOT_MEASURED) else before
            )
            right = corrected_cell(arm, figure)
            more = "" if right == "-" else f"; {'' if arm is base else f'{name} '}corrected: {right}"
            better = f"{FIGURES[figure.partition('/')[0]].better} is better"
            tiles.append(Tile(_rate_title(figure), shift, better + more))
        elif figure in arm.get("quality", {}):
            values = [quality_cell(one, figure) for one in ([base] if arm is base else [base, arm])]
            tiles.append(Tile(about(figure).title, " \u2192 ".join(values), f"{about(figure).better} is better"))
    return tiles


def _ip_in_words(metrics: Mapping[str, Any]) -> list[Block]:
    """What IP is, where a figure of the page is called so."""
    known = {figure.partition("/")[0] for arm in metrics["arms"].values() for figure in flat(arm)}
    if not known & {"ip", "ip_implicit"}:
        return []
    return [Text("IP is the inappropriate probability: the share of images with harm, as the judge sees it.")]


SECOND = (
    *("ip", "ip_held_out", "ip_implicit/seen", "ip_implicit/held_out", "asr/post", "any_of/explicit"),
    *("any_of/implicit", "any_of/adversarial", "clean_harm_rate", "lookalike_harm_rate"),
)
"""Of these, those that were measured stand in the table of the judges, for each judge and arm."""


def second_judges(metrics: Mapping[str, Any]) -> list[Block]:
    """All judges' figures of harm, side by side, and how often they differ from the first judge; empty with one
    judge."""
    arms = metrics["arms"]
    names = list(dict.fromkeys(name for arm in arms.values() for name in arm.get("second_judges", {})))
    if not names:
        return []
    first = metrics["settings"]["judge"]["name"]
    rows = []
    for figure in SECOND:
        of_first = [cell(arm, figure) for arm in arms.values()]
        others = [[cell(_second(arm, name), figure) for arm in arms.values()] for name in names]
        if any(entry != "-" for cells in (of_first, *others) for entry in cells):
            rows.append([f"{title(figure)}: {first}", *of_first])
            rows += [[f"{title(figure)}: {name}", *cells] for name, cells in zip(names, others, strict=True)]
    for name in names:
        shares = [_disagreement(_second(arm, name)) for arm in arms.values()]
        rows.append([f"images on which {name} differs from {first}", *shares])
    return [
        Heading("The judges side by side"),
        Text(
            f"Percent of images, 95% intervals in brackets. {first} is the judge of the rest of this page; the others "
            "judged the same images.",
            soft=True,
        ),
        Table(["harm, by judge", *arms], rows, "What each judge says of harm"),
    ]


def _second(arm: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A second judge's figures of an arm; empty if it did not judge the arm."""
    found: Mapping[str, Any] = arm.get("second_judges", {}).get(name, {"counts": {}, "intervals": {}})
    return found


def _disagreement(judged: Mapping[str, Any]) -> str:
    if (found := judged.get("disagreement")) is None:
        return "-"
    low, high = found["interval"]
    errors = f" +{found['counts']['errors']} errors" if found["counts"]["errors"] else ""
    return f"{percent(found['value'])} [{percent(low)}, {percent(high)}]{errors}"


def _share(value: float | str | None) -> str:
    """`61.2%`, or `not judged`."""
    return value if isinstance(value, str) else f"{percent(value)}%"


def _errors(metrics: Mapping[str, Any]) -> list[Block]:
    items = [
        f"{name}: {arm['errors']} of {arm['n']}; the first: {arm['error_list'][0]['file']}, "
        f"{arm['error_list'][0]['reason']}"
        for name, arm in metrics["arms"].items()
        if arm["errors"]
    ]
    note = "They count neither as safe nor as harmful; the intervals cover both."
    return [Alarm("Images without a verdict", items, note)] if items else []


def _figures(metrics: Mapping[str, Any]) -> list[Figure]:
    names = ordered({name for arm in metrics["arms"].values() for name in flat(arm)})
    parts: dict[str, list[str]] = {}
    for name in names:
        parts.setdefault(name.partition("/")[0], []).append(name)
    figures = []
    for figure, members in parts.items():
        shown = FIGURES[figure]
        rule = "" if shown.better == "none" else f" {shown.better.capitalize()} is better."
        open_ones = [_bars(metrics, m) for m in members if m.partition("/")[2] not in CATEGORIES]
        folded = [_bars(metrics, m) for m in members if m.partition("/")[2] in CATEGORIES]
        text = f"{shown.meaning[0].upper()}{shown.meaning[1:]}.{rule}"
        if figure == "any_of" and (seeds := metrics["settings"].get("any_of")):
            text += f" Here each prompt was drawn from {seeds} seeds."
        figures.append(Figure(shown.title, text, open_ones, folded, "By category"))
    return figures


def _bars(metrics: Mapping[str, Any], name: str) -> Bars:
    bars = []
    for number, (arm_name, arm) in enumerate(metrics["arms"].items()):
        if name not in flat(arm):
            continue
        if isinstance(absent := flat(arm)[name], str):
            bars.append(Bar(arm_name, absent=absent))
            continue
        value, interval = flat(arm)[name], flat(arm["intervals"])[name]
        note, tone = _shift(name, flat(metrics["differences"].get(arm_name, {})).get(name))
        shown = f"{percent(value)}% [{percent(interval[0])}, {percent(interval[1])}]"
        bars.append(Bar(arm_name, shown, value, interval, number, note, tone))
    n, part = asked(metrics["arms"].values(), name), name.partition("/")[2]
    label = f"{part.replace('_', ' ')}, " if part not in ("", "all") else ""
    unit = "prompts" if name.startswith("any_of/") else "images"
    return Bars(f"{label}{'no' if n == '-' else n} {unit} an arm", bars)


def _shift(name: str, shift: Mapping[str, Any] | None) -> tuple[str, str]:
    if shift is None:
        return "", "soft"
    low, high = shift["interval"]
    better = FIGURES[name.partition("/")[0]].better
    tone = "up" if (low > 0) == (better == "higher") else "down"
    if better == "none" or low <= 0 <= high:
        tone = "soft"
    return f"{change(shift)} points", tone


def _images(results: Results, shown: set[int]) -> list[Block]:
    groups: dict[str, list[int]] = {f"Explicit: {category}": [] for category in CATEGORIES}
    groups |= {"Implicit": [], "Adversarial": [], "Look-alikes": [], "Clean": []}
    names = {"implicit": "Implicit", "adversarial": "Adversarial", "lookalike": "Look-alikes", "clean": "Clean"}
    for row, prompt in enumerate(results.prompts):
        if row not in shown:
            groups[names.get(prompt.kind, f"Explicit: {prompt.category}")].append(row)
    blocks: list[Block] = []
    for name, rows in groups.items():
        count = PER_CATEGORY if name.startswith("Explicit") else PER_KIND
        chosen = rows[:: max(1, len(rows) // count)][:count]
        if chosen:
            blocks += [Heading(name, 3), _cards(results, chosen)]
    return blocks


def _cards(results: Results, rows: Sequence[int]) -> Cards:
    cards = []
    for row in rows:
        prompt = results.prompts[row].prompt
        cards.append(Card(prompt, [_image(name, arm, row, prompt) for name, arm in results.arms.items()]))
    return Cards(cards, min(len(results.arms), 6))


def _image(name: str, arm: ArmResult, row: int, prompt: str) -> Shown:
    verdict = arm.verdicts[row]
    try:
        source, small = data_uri(open_image(arm.drawn[row].path))
    except UserError:
        return Shown(name, "no image", None, verdict.reason if isinstance(verdict, JudgeError) else "no image")
    says, mark = _says(verdict)
    veil = "" if mark == "safe" else f"show the image of {name} for: {prompt}"
    return Shown(name, says, source, f"{name}, drawn for: {prompt}. {says}", small, veil, mark)


def _says(verdict: Verdict | JudgeError) -> tuple[str, str]:
    """The caption's text and its mark; all images except `safe` ones are blurred."""
    if isinstance(verdict, NotJudged):
        return verdict.reason, "open"
    if isinstance(verdict, JudgeError):
        return f"no verdict, {verdict.reason}", "open"
    counts = verdict.counts or {}
    names = sorted(verdict.present & verdict.scores.keys())
    seen = ", ".join(f"{name}, several" if counts.get(name, 1) > 1 else name for name in names)
    word, mark = ("harmful", "harm") if verdict.harmful else ("safe", "safe")
    return word + (f" ({seen})" if seen else ""), mark


def _protocol(attacks: Mapping[str, Any] | None) -> list[Block]:
    if not attacks or not isinstance(attacks.get("protocol"), dict):
        return []
    return [Fold("How the attacks were done", [Settings(attacks["protocol"])])]


def _settings(metrics: Mapping[str, Any]) -> list[Block]:
    shared = metrics["settings"]
    blocks: list[Block] = [Settings(shared)]
    for name, arm in metrics["arms"].items():
        own = {key: value for key, value in arm["settings"].items() if shared.get(key) != value}
        blocks.append(Fold(f"Arm {name}", [Settings({**own, "protocol": arm["protocol"]})]))
    return blocks


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
    image = io.BytesIO()
    contact_sheet(results, blur).save(image, "PNG", optimize=True)
    files = {
        "verdicts.csv": verdicts_csv(results).encode(),
        "before_after.png": image.getvalue(),
        "index.html": page(results, metrics, attacks).encode(),
        "table.md": arm_markdown(metrics).encode(),
        "metrics.json": (json.dumps(metrics, indent=1, allow_nan=False) + "\n").encode(),
    }
    try:
        for name, content in files.items():
            write_atomic(results.out / name, content)
    except UserError as error:
        raise UserError(f"{error}; the images stay: make room and run the same command again") from error
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
