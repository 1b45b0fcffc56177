"""The results file: one JSON line a finished job, only ever appended to."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lit_safety.errors import UserError
from lit_safety.study.plan import Job, Study

FILE_NAME = "results.jsonl"


@dataclass(frozen=True)
class Result:
    """What one job gave."""

    row: str
    seed: int
    digest: str
    """Of the commands; a result whose row was changed since then no longer counts."""
    seconds: float
    """Wall time of all its commands."""
    figures: dict[str, float | None]
    """By column; None where the job has no such figure."""
    base: dict[str, float | None]
    """The same of the base, where the study asks for it."""
    commands: list[list[str]]


def read_results(folder: Path) -> list[Result]:
    """All lines of the results file; a last line that a kill cut short is left out.

    Raises:
        UserError: a line that is not the last one is damaged.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    results = []
    for number, line in enumerate(lines, 1):
        try:
            results.append(Result(**json.loads(line)))
        except (ValueError, TypeError) as error:
            if number == len(lines):
                break
            raise UserError(f"{path}: line {number} is damaged ({error}); take it out and run again") from error
    return results


def append_result(folder: Path, result: Result) -> None:
    """Add a line and have it on disk before the next job begins."""
    path = folder / FILE_NAME
    folder.mkdir(parents=True, exist_ok=True)
    whole = not path.is_file() or path.read_bytes()[-1:] in (b"\n", b"")
    with open(path, "a", encoding="utf-8") as file:
        file.write(("" if whole else "\n") + json.dumps(asdict(result), ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


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
        UserError: its metrics file is missing or no JSON.
    """
    try:
        metrics = json.loads(job.metrics.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{job.name}: {job.metrics} cannot be read ({error}), though its commands succeeded") from error
    figures = {column: _look_up(metrics, place) for column, place in study.figures.items()}
    if not any(value is not None for value in figures.values()):
        raise UserError(f"{job.name}: {job.metrics} holds none of the figures {', '.join(study.figures.values())}")
    base = {column: _look_up(metrics, place) for column, place in study.baseline.items()}
    return Result(job.row, job.seed, job.digest, round(seconds, 1), figures, base, [list(c) for c in job.commands])


def _look_up(metrics: Any, place: str) -> float | None:
    """The number at `a.b.0` (keys, and positions in a list); `max:a.b` is the largest of the numbers in b."""
    if place.startswith("max:"):
        place, largest = place.removeprefix("max:"), True
    else:
        largest = False
    for part in place.split("."):
        if isinstance(metrics, list) and part.isdigit() and int(part) < len(metrics):
            metrics = metrics[int(part)]
        elif isinstance(metrics, dict) and part in metrics:
            metrics = metrics[part]
        else:
            return None
    if largest:
        numbers = [value for value in metrics.values() if value is not None] if isinstance(metrics, dict) else []
        return float(max(numbers)) if numbers else None
    return float(metrics) if isinstance(metrics, int | float) and not isinstance(metrics, bool) else None
