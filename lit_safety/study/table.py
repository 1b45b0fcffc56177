"""Images of a study's results."""

from __future__ import annotations

import io
import statistics
from pathlib import Path
from typing import Any

from lit_safety.core.errors import UserError
from lit_safety.core.files import write_atomic
from lit_safety.study.plan import Growth, HeatMap, Study, jobs_of, load_study
from lit_safety.study.results import Result, latest, read_results


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


# Images of studies whose jobs have several arms: a heat map, and how a figure grows from row to row.


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


# The table and the plots of a study, from its results file.


#: More figures than these are shown below each other, where rows are fewer.
WIDEST = 9


def tabulate(study: str, out: str | None = None) -> None:
    """Print a study's table, and write it as `table.md` with the plot `pareto.png`.

    Args:
        study: the study file.
        out: folder for table and plot; null: the study's own.

    Raises:
        UserError: the study file is wrong, or nothing is done yet.
    """
    plan = load_study(study)
    results = newest(plan)
    if not results:
        raise UserError(f"{plan.out}: nothing is done yet; `study run {study}` does it")
    table = markdown(plan, results)
    folder = Path(out or plan.out)
    print(table)
    print(f"\ntable: {write_atomic(folder / 'table.md', table.encode())}")
    if plan.pareto:
        print(f"plot: {pareto(plan, results, folder / 'pareto.png')}")
    for name, asked in plan.heatmaps.items():
        if asked.row in newest_by_row(plan):
            print(f"plot: {heatmap(asked, plan, newest_by_row(plan), folder / f'heatmap-{name}.png')}")
    if plan.growth:
        print(f"plot: {growth(plan.growth, plan, newest_by_row(plan), folder / 'growth.png')}")


def newest_by_row(study: Study) -> dict[str, list[Result]]:
    """Row -> its results by seed, of the commands as they are now; rows without one are left out."""
    jobs = jobs_of(study)
    done = latest(read_results(Path(study.out)), jobs)
    found: dict[str, list[Result]] = {row: [] for row in study.rows if row not in study.prepare}
    for job in jobs:
        if job.row in found and job.name in done:
            found[job.row].append(done[job.name])
    return {row: results for row, results in found.items() if results}


def newest(study: Study) -> dict[str, list[Result]]:
    """The same by row of the table: where arms are told apart, each has its own."""
    found: dict[str, list[Result]] = {}
    for results in newest_by_row(study).values():
        for result in results:
            for name, one in result.by_arm().items():
                found.setdefault(name, []).append(one)
    return found


def values(results: list[Result], column: str) -> list[float]:
    """One column's numbers, one a seed that has it."""
    found = [result.figures.get(column) for result in results]
    return [value for value in found if isinstance(value, float)]


def markdown(study: Study, results: dict[str, list[Result]]) -> str:
    """Mean over the seeds and, where there are several, the lowest and highest of them.

    A line a row of the study; a line a figure where these are more than fit beside each other and more than the rows.
    """
    columns = [name for name, place in study.figures.items() if not place.rpartition("#")[2].startswith("each:")]
    base = {c: v for rows in results.values() for r in rows for c, v in r.base.items() if v is not None}
    cells = {"base": [_cell([base[c]] if c in base else [], c in study.percent) for c in columns]} if base else {}
    for row, found in results.items():
        seeds = f" ({len(found)} seed{'s' if len(found) > 1 else ''})"
        cells[row + seeds] = [_cell(values(found, column), column in study.percent) for column in columns]
    heads = [f"{column} (%)" if column in study.percent else column for column in columns]
    if len(columns) > max(WIDEST, len(cells)):
        lines = [["", *cells], *([head, *(cells[row][i] for row in cells)] for i, head in enumerate(heads))]
    else:
        lines = [["", *heads], *([row, *own] for row, own in cells.items())]
    rule = "|---" * len(lines[0]) + "|"
    return "\n".join([_line(lines[0]), rule, *map(_line, lines[1:])]) + "\n"


def _line(words: list[str]) -> str:
    return f"| {' | '.join(words)} |"


def _cell(numbers: list[float], percent: bool) -> str:
    if not numbers:
        return ""
    shown = [100 * number if percent else number for number in numbers]
    digits = 1 if percent or max(map(abs, shown)) >= 10 else 3
    mean = f"{statistics.fmean(shown):.{digits}f}"
    return mean if len(shown) == 1 else f"{mean} ({min(shown):.{digits}f} to {max(shown):.{digits}f})"
