"""The results file: one JSON line a finished job, only ever appended to."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lit_safety.core.errors import UserError
from lit_safety.core.text import load_json
from lit_safety.evaluation.metrics import NOT_JUDGED, NOT_MEASURED
from lit_safety.study.plan import Job, Study

FILE_NAME = "results.jsonl"
Figure = float | dict[str, float] | str | None
"""A number, for an `each:` column several by their names, or why there is none: `not measured`, `not judged`."""
ARM = "{arm}"
SUMMARIES: dict[str, Callable[[Iterable[float]], float]] = {"max": max, "mean": statistics.fmean}


@dataclass(frozen=True)
class Result:
    """What one job gave."""

    row: str
    seed: int
    digest: str
    """Of the commands; a result whose row was changed since then no longer counts."""
    seconds: float
    """Wall time of all its commands."""
    figures: dict[str, Figure]
    """By column; None where the job has no such figure."""
    base: dict[str, float | None]
    """The same of the base, where the study asks for it."""
    commands: list[list[str]]
    arms: dict[str, dict[str, Figure]] = field(default_factory=dict)
    """The figures of each arm, where the study asks for them by arm."""

    def by_arm(self) -> dict[str, Result]:
        """This result as one for each row of the table: `row: arm`, or the row itself where no arms are told apart."""
        if not self.arms:
            return {self.row: self}
        own = {name: replace(self, figures={**self.figures, **found}, arms={}) for name, found in self.arms.items()}
        return {f"{self.row}: {name}": result for name, result in own.items()}


def read_results(folder: Path) -> list[Result]:
    """All lines of the results file; a last line that a kill cut short is left out.

    Raises:
        UserError: a line that is not the last one is damaged.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")  # the last one is what stands after the last line's end
    results = []
    for number, line in enumerate(lines, 1):
        try:
            results.append(Result(**load_json(line)))
        except (ValueError, TypeError) as error:
            if number == len(lines):
                break
            raise UserError(f"{path}: line {number} is damaged ({error}); take it out and run again") from error
    return results


def append_result(folder: Path, result: Result) -> None:
    """Add a line and have it on disk before the next job begins."""
    path = folder / FILE_NAME
    folder.mkdir(parents=True, exist_ok=True)
    start = _end_last_line(path)
    with open(path, "ab") as file:
        file.write(start + json.dumps(asdict(result), ensure_ascii=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _end_last_line(path: Path) -> bytes:
    """What must be written before the next line: the end of a last line that only lacks it, else nothing.

    A last line that a kill cut short is taken off: its job counts as not done, and it must not become a middle line.
    """
    rest = path.read_bytes().rpartition(b"\n")[2] if path.is_file() else b""
    if not rest:
        return b""
    try:
        load_json(rest)
    except ValueError:
        os.truncate(path, path.stat().st_size - len(rest))
        return b""
    return b"\n"


def latest(results: list[Result], jobs: list[Job]) -> dict[str, Result]:
    """Job name -> its newest result, of the commands as they are now."""
    wanted = {(job.row, job.seed, job.digest): job.name for job in jobs}
    found = {}
    for result in results:
        name = wanted.get((result.row, result.seed, result.digest))
        if name is not None:
            found[name] = result
    return found


def collect(study: Study, job: Job, seconds: float) -> Result:
    """Read the figures that a finished job left.

    Raises:
        UserError: its metrics file is missing or no JSON, or it holds no figure.
    """
    commands = [list(words) for words in job.commands]
    if job.metrics is None:
        return Result(job.row, job.seed, job.digest, round(seconds, 1), {}, {}, commands)
    metrics = _read(job, job.metrics)

    def read(places: dict[str, str], arm: str = "") -> dict[str, Figure]:
        found: dict[str, Figure] = {}
        for column, place in places.items():
            file, _, within = place.replace(ARM, arm).rpartition("#")
            other = job.folder / file if file else None
            source = metrics if other is None else _read(job, other) if other.is_file() else {}
            found[column] = _look_up(source, within)
        return found

    by_arm = {column: place for column, place in study.figures.items() if ARM in place}
    figures = read({column: place for column, place in study.figures.items() if ARM not in place})
    names = [name for name in metrics.get("arms", {}) if name != "base"] if by_arm else []
    arms = {name: read(by_arm, name) for name in names}
    if not any(value is not None for one in (figures, *arms.values()) for value in one.values()):
        raise UserError(f"{job.name}: {job.metrics} holds none of the figures {', '.join(study.figures.values())}")
    base = {column: _number(value) for column, value in read(study.baseline).items()}
    return Result(job.row, job.seed, job.digest, round(seconds, 1), figures, base, commands, arms)


def _read(job: Job, file: Path) -> Any:
    try:
        return load_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{job.name}: {file} cannot be read ({error}), though its commands succeeded") from error


def _look_up(metrics: Any, place: str) -> Figure:
    """The number at `a.b.0` (keys, and positions in a list); `max:a.b` is the largest of the numbers in b, `mean:a.b`
    their mean, and `each:a.b` all of them by their names."""
    how, _, where = place.rpartition(":")
    for part in where.split("."):
        if isinstance(metrics, list) and part.isdigit() and int(part) < len(metrics):
            metrics = metrics[int(part)]
        elif isinstance(metrics, dict) and part in metrics:
            metrics = metrics[part]
        else:
            return None
    if not how:
        return metrics if metrics in (NOT_JUDGED, NOT_MEASURED) else _number(metrics)
    each = (
        {name: n for name, value in metrics.items() if (n := _number(value)) is not None}
        if isinstance(metrics, dict)
        else {}
    )
    if how == "each":
        return each or None
    if how not in SUMMARIES:
        raise UserError(f"figure {place}: {how!r} is none of each, {', '.join(SUMMARIES)}")
    return SUMMARIES[how](each.values()) if each else None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
