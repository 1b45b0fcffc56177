"""The one chart stack, on matplotlib: points, lines, bands and heat maps from plain data, into a page or a PNG file.

In a page a chart is SVG with the colours of the page, light and dark, and its texts stay texts.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor
from typing import Any, Literal
from xml.etree import ElementTree

WIDTH, HEIGHT = 560, 400
"""Size of a chart in a page, in units of the drawing."""
LEFT, RIGHT, TOP, BOTTOM = 66, 28, 16, 62
"""The margins around its axes."""
LINE = 18
"""Height of a line of text: readable if a phone shows the drawing at two thirds of its size."""
COLOURS = 10
"""The colours `--c0` to `--c9` of the page's style."""
INK, SOFT, GRID, PAPER = "#181b22", "#5b6270", "#dfe2e8", "#ffffff"
PALETTE = ("#6b7280", "#1f6feb", "#b45309", "#7c3aed", "#0f766e", "#be185d", "#15803d", "#7f1d1d", "#0369a1", "#a16207")
"""The page's colours in light mode. A chart in a page has the style's names instead."""
DASHES = ("-", (0, (6, 3)), (0, (2, 2)), (0, (8, 3, 3, 3)))
MARKERS = "osD^vPX*<>"
"""Lines also differ in dashes and marks, because not everybody can distinguish the colours."""
DPI = 110
_SVG, _XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"


@dataclass(frozen=True)
class Axis:
    """One axis.

    Args:
        label: its text, with the unit.
        ends: its range; None: from the data.
        ticks: places with their labels; None: matplotlib's own.
        scale: `log2`, or `symlog`, which is linear up to `linear`.
        linear: see `scale`.
    """

    label: str
    ends: tuple[float, float] | None = None
    ticks: Sequence[tuple[float, str]] | None = None
    scale: Literal["linear", "log2", "symlog"] = "linear"
    linear: float = 1.0


@dataclass(frozen=True)
class Point:
    """A point, and the ranges (low, high) over which whiskers or a band go."""

    x: float
    y: float
    x_range: Sequence[float] | None = None
    y_range: Sequence[float] | None = None


@dataclass(frozen=True)
class Series:
    """Points of one name.

    Args:
        name: the text of the legend, or the label next to the first point.
        points: in order.
        colour: number of its colour.
        line: join the points; `order` decides its dashes and marks.
        band: fill the area between the ranges along y, instead of whiskers.
        order: its number among the lines.
        mark: text next to its first point in a PNG file; empty: none.
    """

    name: str
    points: Sequence[Point]
    colour: int = 0
    line: bool = False
    band: bool = False
    order: int = 0
    mark: str = ""


@dataclass(frozen=True)
class Chart:
    """What is drawn: series over two axes, and perhaps a dashed line through `steps`.

    Args:
        title: what it shows.
        x: the horizontal axis.
        y: the vertical one.
        series: drawn in this order.
        steps: corners of a dashed line.
        named: write each series' name next to its first point, without covering other names.
    """

    title: str
    x: Axis
    y: Axis
    series: Sequence[Series]
    steps: Sequence[tuple[float, float]] = ()
    named: bool = False


def pareto_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Names of the points on the Pareto front: a lower first and a higher second coordinate are better.

    A point is not on it if another one is at least as good in both coordinates and better in one. In order of the first
    coordinate.
    """
    kept = [
        name
        for name, (cost, gain) in points.items()
        if not any(c <= cost and g >= gain and (c, g) != (cost, gain) for c, g in points.values())
    ]
    return sorted(kept, key=lambda name: points[name])


def share_range(values: Sequence[float]) -> tuple[float, float, list[tuple[float, str]]]:
    """Range and ticks in percent of an axis of shares, from below the smallest value to above the largest."""
    low, high = min(values), max(values)
    step = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2, 1.0) if high - low <= 6 * step)
    first = max(0, floor(low / step + 1e-9))
    last = max(ceil(high / step - 1e-9), first + 1)
    marks = [(number * step, f"{100 * number * step:.0f}%") for number in range(first, last + 1)]
    return first * step, last * step, marks


def svg(chart: Chart, name: str, description: str) -> str:
    """The chart as an SVG element for a page; a screen reader reads its title and the description.

    Args:
        chart: what is drawn.
        name: unique on the page; letters, digits and `-`.
        description: what it shows, for people who cannot see it.
    """
    # The same bytes each time: no date, and names of parts that depend only on the chart's name.
    with _plain({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 15}):
        figure = _figure(WIDTH / 72, HEIGHT / 72, 72, None)
        axes = figure.add_axes(
            (LEFT / WIDTH, BOTTOM / HEIGHT, (WIDTH - LEFT - RIGHT) / WIDTH, (HEIGHT - TOP - BOTTOM) / HEIGHT)
        )
        _draw(axes, chart, f"{name}-")
        _bare(axes)
        axes.xaxis.set_label_coords(0.5, -40 / (HEIGHT - TOP - BOTTOM))
        axes.yaxis.set_label_coords(-50 / (WIDTH - LEFT - RIGHT), 0.5)
        if chart.named:
            _write_names(figure, axes, chart)
        for part in figure.findobj():
            part.set_clip_on(False)  # all parts are inside the axes, and a clip path would need a URL
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _for_a_page(buffer.getvalue(), name, chart.title, description)


def png(charts: Sequence[Chart], size: tuple[float, float], columns: int = 1, legend: str = "below") -> bytes:
    """Charts side by side as a PNG file with one legend for all.

    Args:
        charts: what is drawn.
        size: of one chart in inches, without a legend below.
        columns: how many are side by side.
        legend: `below` (each chart then has its title above it), or the title of a legend on the right.
    """
    with _plain():
        return _png(charts, size, columns, legend)


def _png(charts: Sequence[Chart], size: tuple[float, float], columns: int, legend: str) -> bytes:
    rows = -(-len(charts) // columns)
    below = legend == "below"
    figure = _figure(size[0] * columns, size[1] * rows + 0.6 * below, DPI, "constrained")
    handles: dict[str, Any] = {}
    for number, chart in enumerate(charts, 1):
        axes = figure.add_subplot(rows, columns, number)
        handles |= _draw(axes, chart, "")
        for series in chart.series:
            if series.mark:
                first, colour = series.points[0], PALETTE[series.colour % COLOURS]
                axes.annotate(series.mark, (first.x, first.y), (3, 4), textcoords="offset points", fontsize=8,
                              color=colour)  # fmt: skip
        axes.tick_params(labelsize=8)
        axes.grid(color=GRID)
        axes.set_axisbelow(True)
        if below:
            axes.set_title(chart.title, fontsize=10)
        for axis in (axes.xaxis, axes.yaxis):
            axis.label.set_size(8 if below else 10)
    if below:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, fontsize=9, frameon=False)
    else:
        figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=8, frameon=False,
                      title=legend or None, title_fontsize=8)  # fmt: skip
    return _png_bytes(figure)


def heatmap_png(
    numbers: Mapping[str, Mapping[str, float]], label: str, top: float | None = None, size: tuple[float, float] = (8, 6)
) -> bytes:
    """Rows of named numbers as coloured cells, in a PNG file.

    Args:
        numbers: row -> column -> number; a number may be missing.
        label: what they are.
        top: the number of the darkest colour; None: the largest.
        size: in inches.
    """
    with _plain():
        return _heatmap(numbers, label, top, size)


def _heatmap(
    numbers: Mapping[str, Mapping[str, float]], label: str, top: float | None, size: tuple[float, float]
) -> bytes:
    names = list(dict.fromkeys(name for row in numbers.values() for name in row))
    cells = [[row.get(name, float("nan")) for name in names] for row in numbers.values()]
    figure = _figure(*size, DPI, "constrained")
    axes = figure.add_subplot()
    shown = axes.imshow(cells, cmap="Reds", vmin=0, vmax=top, aspect="auto")
    axes.set_xticks(range(len(names)), names, rotation=35, ha="right")
    axes.set_yticks(range(len(cells)), list(numbers))
    middle = shown.norm.vmin + (shown.norm.vmax - shown.norm.vmin) / 2
    for down, row in enumerate(cells):
        for across, number in enumerate(row):
            colour = "white" if number > middle else "black"
            axes.text(across, down, f"{number:.1f}", ha="center", va="center", fontsize=8, color=colour)
    figure.colorbar(shown, label=label)
    return _png_bytes(figure)


def heatmap_svg(
    numbers: Mapping[str, Mapping[str, float | None]],
    name: str,
    title: str,
    description: str,
    form: str = ".2f",
    top: float | None = None,
) -> str:
    """The same as an SVG element for a page.

    Args:
        numbers: row -> column -> number; None, or none at all: an empty cell.
        name: unique on the page; letters, digits and `-`.
        title: what it shows.
        description: what it shows, for people who cannot see it.
        form: how numbers are written.
        top: the number of the darkest colour; None: the largest.
    """
    columns = list(dict.fromkeys(column for row in numbers.values() for column in row))
    known = [value for row in numbers.values() for value in row.values() if value is not None]
    most = top or max(known, default=1.0) or 1.0
    longest = max((len(row) for row in numbers), default=0)
    left, bottom, up = min(0.5, 0.05 + 0.0155 * longest), 0.22, 0.97
    with _plain({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 11}):
        from matplotlib import colormaps
        from matplotlib.patches import Rectangle

        figure = _figure(WIDTH / 72, HEIGHT / 72, 72, None)
        axes = figure.add_axes((left, bottom, 0.98 - left, up - bottom))
        for down, row in enumerate(numbers.values()):
            for across, column in enumerate(columns):
                value = row.get(column)
                if value is None:
                    continue
                share = min(1.0, max(0.0, value / most))
                axes.add_patch(Rectangle((across, down), 1, 1, facecolor=colormaps["Reds"](share), edgecolor="none"))
                ink = "#fffffe" if share > 0.5 else "#000001"  # on a cell, whatever the page's mode
                axes.text(across + 0.5, down + 0.5, format(value, form), ha="center", va="center", color=ink)
        axes.set_xlim(0, max(1, len(columns)))
        axes.set_ylim(max(1, len(numbers)), 0)
        axes.set_xticks([n + 0.5 for n in range(len(columns))], columns, rotation=20, ha="right")
        axes.set_yticks([n + 0.5 for n in range(len(numbers))], list(numbers))
        _bare(axes)
        axes.grid(visible=False)
        for part in figure.findobj():
            part.set_clip_on(False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    drawn = _for_a_page(buffer.getvalue(), name, title, description)
    # the page draws a line of the paper's colour around texts, which would hide those on dark cells
    return drawn.replace("fill: #fffffe", "fill: #ffffff; stroke: none").replace(
        "fill: #000001", "fill: #000000; stroke: none"
    )


def _plain(more: Mapping[str, Any] | None = None) -> Any:
    """Escape names, so that a $ in a name does not begin a formula."""
    from matplotlib import rc_context

    settings: Any = {"text.parse_math": False, **(more or {})}
    return rc_context(settings)


def _figure(width: float, height: float, dpi: int, layout: Literal["constrained"] | None) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def _png_bytes(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def _draw(axes: Any, chart: Chart, prefix: str) -> dict[str, Any]:
    """The chart's content; gives what a legend shows for each series."""
    handles = {}
    if chart.steps:
        axes.plot(*zip(*chart.steps, strict=True), color=SOFT, linewidth=2, dashes=(3, 2.5), gid=f"{prefix}front")
    for number, series in enumerate(chart.series):
        handles[series.name] = _series(axes, series, len(chart.series), f"{prefix}series-{number}", chart.named)
    for axis, asked, set_ends in ((axes.xaxis, chart.x, axes.set_xlim), (axes.yaxis, chart.y, axes.set_ylim)):
        if asked.scale != "linear":
            more = {"base": 2} if asked.scale == "log2" else {"linthresh": asked.linear}
            axis._set_axes_scale("log" if asked.scale == "log2" else "symlog", **more)
        if asked.ticks is not None:
            axis.set_ticks([place for place, _ in asked.ticks], [text for _, text in asked.ticks])
            axis.set_ticks([], minor=True)
        if asked.ends is not None:
            set_ends(*asked.ends)
        axis.set_label_text(asked.label)
    return handles


def _series(axes: Any, series: Series, others: int, gid: str, bold: bool) -> Any:
    colour = PALETTE[series.colour % COLOURS]
    xs, ys = [p.x for p in series.points], [p.y for p in series.points]
    if series.band:
        low, high = ([p.y if p.y_range is None else p.y_range[end] for p in series.points] for end in (0, 1))
        axes.fill([*xs, *xs[::-1]], [*low, *high[::-1]], color=colour, alpha=0.13, linewidth=0)
    else:
        for p in series.points:
            if p.x_range is not None:
                axes.plot([*p.x_range], [p.y, p.y], color=colour, linewidth=2 if bold else 1.2)
            if p.y_range is not None:
                axes.plot([p.x, p.x], [*p.y_range], color=colour, linewidth=2 if bold else 1.2)
    if not series.line:
        (marks,) = axes.plot(xs, ys, "o", color=colour, markersize=12 if bold else 6, gid=f"{gid}-points")
        return marks
    # Lines that cover each other differ in dashes, and in marks, of which the first are the largest.
    (line,) = axes.plot(
        xs, ys, color=colour, linewidth=2, linestyle=DASHES[series.order % len(DASHES)], gid=f"{gid}-line",
        marker=MARKERS[series.order % len(MARKERS)], markersize=6 + min(4, others - series.order) * 0.8,
    )  # fmt: skip
    return line


def _bare(axes: Any) -> None:
    """The look of a chart in a page: lines of a grid, and no frame."""
    axes.grid(color=GRID, linewidth=1)
    axes.set_axisbelow(True)
    axes.set_facecolor("none")
    axes.tick_params(length=0, pad=8, colors=INK)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set_color(SOFT)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _write_names(figure: Any, axes: Any, chart: Chart) -> None:
    """A name next to each point, without covering other names, and with a line to its point if that is far away."""
    taken: list[tuple[float, float, float]] = []
    for series in chart.series:
        right, up = axes.transData.transform((series.points[0].x, series.points[0].y))
        down = HEIGHT - up
        start, row, before = name_place(right, down, series.name, taken)
        wide = _wide(series.name)
        taken.append((start, start + wide, row))
        if abs(row - down - 5) > LINE:
            end = start + wide + 2 if before else start - 2
            _line(figure, (right, down), (end, row - 5))
        colour = PALETTE[series.colour % COLOURS]
        figure.text(max(2.0, start) / WIDTH, 1 - row / HEIGHT, series.name, color=colour)


def name_place(
    right: float, down: float, text: str, taken: Sequence[tuple[float, float, float]]
) -> tuple[float, float, bool]:
    """The position of a name next to a point, its line, and whether it is on the left of the point.

    Args:
        right: where the point is, from the left.
        down: the same from the top.
        text: the name.
        taken: beginning, end and line of the names that are placed already.
    """
    wide = _wide(text)
    before = right + 12 + wide > WIDTH - 2  # not enough space on the right
    start = right - 12 - wide if before else right + 12
    # above and below the point, because its whisker would cross a name next to it
    places = [down + 5 + side * (13 + LINE * step) for step in range(12) for side in (-1, 1)]
    inside = [row for row in places if TOP + 8 <= row <= HEIGHT - BOTTOM - 2] or [down + 5]

    def free(row: float) -> bool:
        return not any(start < b and a < start + wide and abs(row - other) < LINE for a, b, other in taken)

    return start, next(filter(free, inside), inside[0]), before


def _wide(text: str) -> float:
    return 9.0 * len(text)


def _line(figure: Any, *ends: tuple[float, float]) -> None:
    from matplotlib.lines import Line2D

    xs, ys = [x / WIDTH for x, _ in ends], [1 - y / HEIGHT for _, y in ends]
    figure.add_artist(Line2D(xs, ys, color=SOFT, linewidth=1, transform=figure.transFigure))


def _for_a_page(text: str, name: str, title: str, description: str) -> str:
    """The drawing of an SVG file, in the page's colours and font, with names for a screen reader."""
    root = ElementTree.fromstring(text)
    for parent in list(root.iter()):
        for child in [one for one in parent if one.tag in (f"{_SVG}metadata", f"{_SVG}style")]:
            parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        given = {key.removeprefix(_XLINK): value for key, value in element.attrib.items()}
        if not re.fullmatch(rf"{re.escape(name)}-.*|m[0-9a-f]{{10}}", given.get("id", "-")):
            given.pop("id", None)  # the same in every chart of the page
        if "style" in given:
            kept = [
                one.strip() for one in given["style"].split(";") if one.strip() and not one.strip().startswith("font")
            ]
            given["style"] = "; ".join(_variables(one) for one in kept)
        element.attrib.clear()
        element.attrib.update(given)
    inner = "".join(ElementTree.tostring(child, "unicode") for child in root)
    inner = re.sub(r"(?<=>)\s+(?=<)", "", inner)
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="{name}-t {name}-d">'
        f'<title id="{name}-t">{escape(title)}</title><desc id="{name}-d">{escape(description)}</desc>{inner}</svg>'
    )


def _variables(style: str) -> str:
    """Replace the colours by the page's names of colours."""
    for number, colour in enumerate(PALETTE):
        style = style.replace(colour, f"var(--c{number})")
    return style.replace(INK, "var(--ink)").replace(SOFT, "var(--soft)").replace(GRID, "var(--line)")
