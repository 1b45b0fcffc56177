"""Pictures of studies whose jobs have several arms: a heat map, and how a figure grows from row to row."""

from __future__ import annotations

import io
import statistics
from pathlib import Path
from typing import Any

from lit_safety.data.atomic import write_atomic
from lit_safety.errors import UserError
from lit_safety.study.pictures import Growth, HeatMap
from lit_safety.study.plan import Study
from lit_safety.study.results import Result

Lines = dict[str, dict[int, list[float]]]
"""Arm -> place on the horizontal axis -> its figures, one a seed."""


def cells(asked: HeatMap, results: list[Result]) -> dict[str, dict[str, float]]:
    """Arm -> name in the column -> the mean over the seeds."""
    seen: dict[str, dict[str, list[float]]] = {}
    for result in results:
        for arm, figures in result.arms.items():
            each = figures.get(asked.figure)
            for name, number in each.items() if isinstance(each, dict) else ():
                seen.setdefault(arm, {}).setdefault(name, []).append(number)
    return {arm: {name: statistics.fmean(n) for name, n in row.items()} for arm, row in seen.items()}


def heatmap(asked: HeatMap, study: Study, results: dict[str, list[Result]], path: Path) -> Path:
    """Draw one row's arms (down) against the names of a column (across), the mean over the seeds in each cell.

    Raises:
        UserError: the row is not done yet, or its column holds no numbers by name.
    """
    found = cells(asked, results.get(asked.row, []))
    names = list(dict.fromkeys(name for row in found.values() for name in row))
    if not names:
        raise UserError(f"{study.out}: the heat map's row {asked.row} has no {asked.figure} yet; `study run` does it")
    scale = 100 if asked.figure in study.percent else 1
    numbers = [[scale * row.get(name, float("nan")) for name in names] for row in found.values()]
    figure, axes = _figure(2.5 + 0.75 * len(names), 1.5 + 0.5 * len(found))
    shown = axes.imshow(numbers, cmap="Reds", vmin=0, vmax=100 if scale == 100 else None, aspect="auto")
    axes.set_xticks(range(len(names)), names, rotation=35, ha="right")
    axes.set_yticks(range(len(found)), list(found))
    middle = shown.norm.vmin + (shown.norm.vmax - shown.norm.vmin) / 2
    for down, row in enumerate(numbers):
        for across, number in enumerate(row):
            colour = "white" if number > middle else "black"
            axes.text(across, down, f"{number:.1f}", ha="center", va="center", fontsize=8, color=colour)
    figure.colorbar(shown, label=asked.figure + (" (%)" if scale == 100 else ""))
    return _write(figure, path)


def lines(asked: Growth, results: dict[str, list[Result]]) -> Lines:
    """The lines of the growth plot; rows whose arms are common ground give every line the same point."""
    found: Lines = {}
    for row, place in asked.rows.items():
        for result in results.get(row, ()) if row not in asked.common else ():
            for arm, figures in result.arms.items():
                number = figures.get(asked.figure)
                if isinstance(number, float):
                    found.setdefault(arm, {}).setdefault(place, []).append(number)
    for row, column in asked.common.items():
        for result in results.get(row, ()):
            every = [v for figures in result.arms.values() if isinstance(v := figures.get(column), float)]
            for line in found.values() if every else ():
                line.setdefault(asked.rows[row], []).append(statistics.fmean(every))
    return found


def growth(asked: Growth, study: Study, results: dict[str, list[Result]], path: Path) -> Path:
    """Draw a column over the number that rows stand for: a line an arm through the means, the range over the seeds.

    Raises:
        UserError: none of its rows is done yet.
    """
    found = lines(asked, results)
    if not found:
        raise UserError(f"{study.out}: no row of the growth plot has {asked.figure} yet; `study run` does it")
    scale = 100 if asked.figure in study.percent else 1
    figure, axes = _figure(9, 5)
    for number, (arm, line) in enumerate(found.items()):
        places = sorted(line)
        means = [scale * statistics.fmean(line[place]) for place in places]
        below = [mean - scale * min(line[place]) for mean, place in zip(means, places, strict=True)]
        above = [scale * max(line[place]) - mean for mean, place in zip(means, places, strict=True)]
        # Side by side, so that ranges at one place can be told apart.
        beside = [place * 1.02 ** (number - len(found) / 2) for place in places]
        marker = "os^vDP*X"[number % 8]
        axes.errorbar(beside, means, [below, above], label=arm, marker=marker, capsize=2, linewidth=1.2, markersize=5)
    ticks = sorted({place for line in found.values() for place in line})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(asked.label)
    axes.set_ylabel(asked.figure + (" (%)" if scale == 100 else ""))
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right center", fontsize=9, frameon=False)
    return _write(figure, path)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _write(figure: Any, path: Path) -> Path:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return write_atomic(path, buffer.getvalue())
