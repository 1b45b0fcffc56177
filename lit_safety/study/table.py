"""The table and the plots of a study, from its results file."""

from __future__ import annotations

import statistics
from pathlib import Path

from lit_safety.data.atomic import write_atomic
from lit_safety.errors import UserError
from lit_safety.study.jobs import jobs_of
from lit_safety.study.plan import Study, load_study
from lit_safety.study.results import Result, latest, read_results

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
        from lit_safety.study.plots import pareto

        print(f"plot: {pareto(plan, results, folder / 'pareto.png')}")
    for name, asked in plan.heatmaps.items():
        from lit_safety.study.arm_plots import heatmap

        if asked.row in newest_by_row(plan):
            print(f"plot: {heatmap(asked, plan, newest_by_row(plan), folder / f'heatmap-{name}.png')}")
    if plan.growth:
        from lit_safety.study.arm_plots import growth

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
