"""The table and the plots of a study, from its results file."""

from __future__ import annotations

import statistics
from pathlib import Path

from lit_safety.core.errors import UserError
from lit_safety.core.files import write_atomic
from lit_safety.report.charts import Axis, Chart, Point, Series, heatmap_png, pareto_front, png
from lit_safety.study.plan import Growth, HeatMap, Study, jobs_of, load_study
from lit_safety.study.run import Result, latest, read_results

FRONT, BEATEN = 1, 0
"""Colours of rows: blue and grey."""


def pareto(study: Study, results: dict[str, list[Result]], path: Path) -> Path:
    """Plot the study's two `pareto` columns against each other: a mark for each row, the range over seeds, the
    front."""
    low, high = study.pareto
    scale = {column: 100 if column in study.percent else 1 for column in study.pareto}
    spread = {
        row: [[scale[column] * v for v in values(found, column)] for column in study.pareto]
        for row, found in results.items()
        if all(values(found, column) for column in study.pareto)
    }
    points = {row: (statistics.fmean(x), statistics.fmean(y)) for row, (x, y) in spread.items()}
    best = pareto_front(points)
    series = []
    for number, (row, (x, y)) in enumerate(points.items(), 1):
        xs, ys = spread[row]
        point = Point(x, y, (min(xs), max(xs)), (min(ys), max(ys)))
        # Names next to the marks would cover each other if rows are similar. So marks get numbers, and the names are in
        # a list.
        series.append(Series(f"{number} {row}", [point], FRONT if row in best else BEATEN, mark=str(number)))
    unit = {column: f"{column} (%)" if column in study.percent else column for column in study.pareto}
    chart = Chart(
        "", Axis(f"{unit[low]}, lower is better"), Axis(f"{unit[high]}, higher is better"), series,
        steps=[points[row] for row in best],
    )  # fmt: skip
    return write_atomic(path, png([chart], (12, 6), legend="the front is blue"))


# Plots of studies whose jobs have several arms: a heat map, and how a figure grows from row to row.


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
        raise UserError(f"{study.out}: the heat map's row {asked.row} lacks {asked.figure}; run `study run` first")
    percent = asked.figure in study.percent
    numbers = {arm: {name: (100 if percent else 1) * v for name, v in row.items()} for arm, row in found.items()}
    size = (2.5 + 0.75 * len(names), 1.5 + 0.5 * len(found))
    label = asked.figure + (" (%)" if percent else "")
    return write_atomic(path, heatmap_png(numbers, label, 100 if percent else None, size))


def lines(asked: Growth, results: dict[str, list[Result]]) -> Lines:
    """The lines of the growth plot; a row in `common` gives every line the same point."""
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
    """Plot a column against the number of each row: for each arm a line through the means, with the range over the
    seeds.

    Raises:
        UserError: all of its rows are still missing.
    """
    found = lines(asked, results)
    if not found:
        raise UserError(f"{study.out}: all rows of the growth plot lack {asked.figure}; run `study run` first")
    scale = 100 if asked.figure in study.percent else 1
    series = []
    for number, (arm, line) in enumerate(found.items()):
        points = []
        for place in sorted(line):
            each = [scale * one for one in line[place]]
            # Slightly apart, so that ranges at one place do not cover each other.
            beside = place * 1.02 ** (number - len(found) / 2)
            points.append(Point(beside, statistics.fmean(each), y_range=(min(each), max(each))))
        series.append(Series(arm, points, number + 1, line=True, order=number))
    ticks = sorted({place for line in found.values() for place in line})
    chart = Chart(
        "",
        Axis(asked.label, ticks=[(tick, str(tick)) for tick in ticks], scale="log2"),
        Axis(asked.figure + (" (%)" if scale == 100 else "")),
        series,
    )
    return write_atomic(path, png([chart], (9, 5), legend=""))


# The table and the plots of a study, from its results file.


#: More figures than these are shown below each other, if there are fewer rows.
WIDEST = 9


def tabulate(study: str, out: str | None = None) -> None:
    """Print a study's table, and write it as `table.md` with the plot `pareto.png`.

    Args:
        study: the study file.
        out: folder for table and plot; null: the study's own.

    Raises:
        UserError: the study file is wrong, or there are no results yet.
    """
    plan = load_study(study)
    results = newest(plan)
    if not results:
        raise UserError(f"{plan.out}: there are no results yet; run `study run {study}` first")
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
    """Row -> its results by seed with the current commands; rows without a result are left out."""
    jobs = jobs_of(study)
    done = latest(read_results(Path(study.out)), jobs)
    found: dict[str, list[Result]] = {row: [] for row in study.rows if row not in study.prepare}
    for job in jobs:
        if job.row in found and job.name in done:
            found[job.row].append(done[job.name])
    return {row: results for row, results in found.items() if results}


def newest(study: Study) -> dict[str, list[Result]]:
    """The same by row of the table: if arms are separated, each has its own row."""
    found: dict[str, list[Result]] = {}
    for results in newest_by_row(study).values():
        for result in results:
            for name, one in result.by_arm().items():
                found.setdefault(name, []).append(one)
    return found


def values(results: list[Result], column: str) -> list[float]:
    """One column's numbers, one for each seed that has it."""
    found = [result.figures.get(column) for result in results]
    return [value for value in found if isinstance(value, float)]


def markdown(study: Study, results: dict[str, list[Result]]) -> str:
    """Mean over the seeds and, if there are several, the lowest and the highest.

    One line for each row of the study; or one line for each figure, if there are too many to fit side by side and more
    than rows.
    """
    columns = [name for name, place in study.figures.items() if not place.rpartition("#")[2].startswith("each:")]
    cells = {
        name: [_cell([base[c]] if c in base else [], c in study.percent) for c in columns]
        for name, base in _bases(results).items()
    }
    for row, found in results.items():
        seeds = f" ({len(found)} seed{'s' if len(found) > 1 else ''})"
        cells[row + seeds] = [
            _cell(values(found, column), column in study.percent) or _why(found, column) for column in columns
        ]
    heads = [f"{column} (%)" if column in study.percent else column for column in columns]
    if len(columns) > max(WIDEST, len(cells)):
        lines = [["", *cells], *([head, *(cells[row][i] for row in cells)] for i, head in enumerate(heads))]
    else:
        lines = [["", *heads], *([row, *own] for row, own in cells.items())]
    rule = "|---" * len(lines[0]) + "|"
    return "\n".join([_line(lines[0]), rule, *map(_line, lines[1:])]) + "\n"


def _bases(results: dict[str, list[Result]]) -> dict[str, dict[str, float]]:
    """The figures of the base by its name in the table; rows on different models have one each."""
    bases = {
        row: {column: value for result in found for column, value in result.base.items() if value is not None}
        for row, found in results.items()
    }
    there = {row: base for row, base in bases.items() if base}
    if all(base == one for base in there.values() for one in there.values()):
        return {"base": next(iter(there.values()))} if there else {}
    return {f"base of {row}": base for row, base in there.items()}


def _line(words: list[str]) -> str:
    return f"| {' | '.join(words)} |"


def _why(results: list[Result], column: str) -> str:
    """Why a column has no number in any of the results, such as `not measured`; empty if not stated."""
    said = [value for result in results if isinstance(value := result.figures.get(column), str)]
    return said[0] if said else ""


def _cell(numbers: list[float], percent: bool) -> str:
    if not numbers:
        return ""
    shown = [100 * number if percent else number for number in numbers]
    digits = 1 if percent or max(map(abs, shown)) >= 10 else 3
    mean = f"{statistics.fmean(shown):.{digits}f}"
    return mean if len(shown) == 1 else f"{mean} ({min(shown):.{digits}f} to {max(shown):.{digits}f})"
