"""Pictures of a study's results."""

from __future__ import annotations

import io
import statistics
from pathlib import Path

from lit_safety.data.atomic import write_atomic
from lit_safety.study.plan import Study
from lit_safety.study.results import Result
from lit_safety.study.table import values


def front(points: dict[str, tuple[float, float]]) -> list[str]:
    """Names of the points that no other one beats, the lower first coordinate and the higher second being better.

    A point is beaten by one that is no worse in both and better in one. In order of the first coordinate.
    """
    kept = [
        name
        for name, (cost, gain) in points.items()
        if not any(c <= cost and g >= gain and (c, g) != (cost, gain) for c, g in points.values())
    ]
    return sorted(kept, key=lambda name: points[name])


def pareto(study: Study, results: dict[str, list[Result]], path: Path) -> Path:
    """Draw the study's two `pareto` columns against each other: a mark a row, the range over seeds, the front."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    low, high = study.pareto
    scale = {column: 100 if column in study.percent else 1 for column in study.pareto}
    spread = {
        row: [[scale[column] * v for v in values(found, column)] for column in study.pareto]
        for row, found in results.items()
        if all(values(found, column) for column in study.pareto)
    }
    points = {row: (statistics.fmean(x), statistics.fmean(y)) for row, (x, y) in spread.items()}
    best = front(points)
    figure = Figure(figsize=(12, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, (row, (x, y)) in enumerate(points.items(), 1):
        colour = "tab:blue" if row in best else "tab:gray"
        xs, ys = spread[row]
        reach = ([[x - min(xs)], [max(xs) - x]], [[y - min(ys)], [max(ys) - y]])
        # Names beside the marks would cover each other wherever rows are alike: numbers, and the names in a list.
        axes.errorbar(x, y, *reach[::-1], fmt="o", color=colour, capsize=2, linewidth=0.8, label=f"{number} {row}")
        axes.annotate(str(number), (x, y), textcoords="offset points", xytext=(3, 4), fontsize=8, color=colour)
    figure.legend(loc="outside right center", fontsize=8, frameon=False, title="the front is blue", title_fontsize=8)
    axes.plot(*zip(*(points[row] for row in best), strict=True), color="tab:blue", linewidth=0.8, linestyle="--")
    unit = {column: f"{column} (%)" if column in study.percent else column for column in study.pareto}
    axes.set_xlabel(f"{unit[low]}, lower is better")
    axes.set_ylabel(f"{unit[high]}, higher is better")
    axes.grid(alpha=0.25)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return write_atomic(path, buffer.getvalue())
