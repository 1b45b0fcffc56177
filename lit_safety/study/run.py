"""Run the jobs of a study: several at a time, each in its own processes.

Each finished job is one line of the results file, which is only appended to. A job that is in the file is skipped.
"""

from __future__ import annotations

import fnmatch
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from threading import Event, current_thread, main_thread
from typing import Any

from lit_safety.core.check_config import check_words
from lit_safety.core.errors import Terminated, UserError
from lit_safety.core.files import Lock, lock_of
from lit_safety.core.processes import VARIABLE, check_count
from lit_safety.core.text import load_json
from lit_safety.evaluation.metrics import NOT_JUDGED, NOT_MEASURED
from lit_safety.study.plan import Job, Study, jobs_of, load_study

FILE_NAME = "results.jsonl"
Figure = float | dict[str, float] | str | None
"""A number; for an `each:` column numbers by their names; or why there is none: `not measured`, `not judged`."""
ARM = "{arm}"
SUMMARIES: dict[str, Callable[[Iterable[float]], float]] = {"max": max, "mean": statistics.fmean}


@dataclass(frozen=True)
class Result:
    """The result of one job."""

    row: str
    seed: int
    digest: str
    """Digest of the commands; if the row was changed later, the result does not count any more."""
    seconds: float
    """Wall time of all its commands."""
    figures: dict[str, Figure]
    """By column; None if the job lacks this figure."""
    base: dict[str, float | None]
    """The same for the base, if the study asks for it."""
    commands: list[list[str]]
    arms: dict[str, dict[str, Figure]] = field(default_factory=dict)
    """The figures of each arm, if the study asks for them by arm."""

    def by_arm(self) -> dict[str, Result]:
        """This result as one for each row of the table: `row: arm`, or the row itself if arms are not separated."""
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
    lines = path.read_bytes().split(b"\n")  # the last one is the text after the last line's end
    results = []
    for number, line in enumerate(lines, 1):
        try:
            results.append(Result(**load_json(line)))
        except (ValueError, TypeError) as error:
            if number == len(lines):
                break
            raise UserError(f"{path}: line {number} is damaged ({error}); remove it and run again") from error
    return results


def append_result(folder: Path, result: Result) -> None:
    """Add a line, and write it to the disk before the next job begins."""
    path = folder / FILE_NAME
    folder.mkdir(parents=True, exist_ok=True)
    start = _end_last_line(path)
    with open(path, "ab") as file:
        file.write(start + json.dumps(asdict(result), ensure_ascii=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _end_last_line(path: Path) -> bytes:
    """What must be written before the next line: a line end if only that is missing, else nothing.

    A last line that a kill cut short is removed: its job counts as not done.
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
    """Job name -> its newest result with the current commands."""
    wanted = {(job.row, job.seed, job.digest): job.name for job in jobs}
    found = {}
    for result in results:
        name = wanted.get((result.row, result.seed, result.digest))
        if name is not None:
            found[name] = result
    return found


def collect(study: Study, job: Job, seconds: float) -> Result:
    """Read the figures of a finished job.

    Raises:
        UserError: its metrics file is missing, is not JSON, or lacks all figures.
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
        raise UserError(f"{job.name}: {job.metrics} lacks all of the figures {', '.join(study.figures.values())}")
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
        raise UserError(f"figure {place}: {how!r} is not one of each, {', '.join(SUMMARIES)}")
    return SUMMARIES[how](each.values()) if each else None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


#: Seconds between two checks of a waiting job for an interruption.
POLL = 0.2
#: The program that runs a job's commands.
PROGRAM = (sys.executable, "-m", "lit_safety")


def run_study(study: str, only: str = "*", processes: int = 1, dry_run: bool = False) -> None:
    """Do all jobs of a study that are not done yet. After Ctrl-C or SIGTERM the same call continues.

    Args:
        study: the study file.
        only: do only rows whose name matches this pattern, and the rows that they need.
        processes: jobs at a time; they share the processor's cores, unless OMP_NUM_THREADS is set.
        dry_run: only print the commands.

    Raises:
        UserError: the study file is wrong; another call is doing this study; or jobs failed (the results of the others
            are kept).
    """
    check_count(processes, "--processes")
    plan = load_study(study)
    everything = jobs_of(plan)
    wanted = _wanted(everything, only)
    if not wanted:
        raise UserError(f"{study}: no row matches --only {only}; rows are {', '.join(plan.rows)}")
    for job in wanted:
        check_job(job, plan.out)
    done = latest(read_results(Path(plan.out)), everything)
    left = [job for job in wanted if job.name not in done]
    print(f"{study}: {len(wanted)} jobs, {len(wanted) - len(left)} of them done")
    if dry_run:
        for job in left:
            print(f"{job.name}:", *(f"  python -m lit_safety {shlex.join(words)}" for words in job.commands), sep="\n")
        return
    with alone(Path(plan.out)) as lock, ended_by_sigterm():
        failed = do_jobs(plan, left, done, processes, lock)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(left)} jobs failed: {'; '.join(failed.values())}; the results of the others are "
            "kept"
        )


def check_job(job: Job, out: str) -> None:
    """Refuse a job with an unknown key before anything runs: an evaluation may come hours after its training.

    Raises:
        UserError: names the row, the file or option, and the key.
    """
    for command in job.commands:
        made = [word for word in command if word.startswith(f"--config={out}/")]  # another row may write it later
        try:
            check_words([word for word in command if word not in made])
        except UserError as error:
            raise UserError(f"{job.row}: {command[0]}: {error}") from error


@contextmanager
def alone(out: Path, command: str = "study run") -> Iterator[Lock]:
    """The lock of a study: two calls would do the same jobs in the same folders. The jobs hold the lock too."""
    lock = Lock(
        lock_of(out),
        f"another `{command}` works in {out}, or a killed one left a job that is still ending: wait for it, or start "
        "that one with more --processes",
    )
    try:
        yield lock
    finally:
        lock.release()


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Inside, SIGTERM ends the running commands, as Ctrl-C does; without this they would keep running."""
    if current_thread() is not main_thread():
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _wanted(jobs: Sequence[Job], only: str) -> list[Job]:
    """Matching jobs and all that they need. Needed ones come before, so one pass from the end finds them."""
    names: set[tuple[str, int]] = set()
    for job in reversed(jobs):
        if fnmatch.fnmatch(job.row, only) or (job.row, job.seed) in names:
            names |= {(job.row, job.seed), *((row, job.seed) for row in job.needs)}
    return [job for job in jobs if (job.row, job.seed) in names]


def do_jobs(study: Study, left: Sequence[Job], done: dict[str, Result], processes: int, lock: Lock) -> dict[str, str]:
    """Do the jobs, each noted in the results file as soon as it is finished.

    Args:
        study: where results go, and which figures are read.
        left: the jobs to do.
        done: those that are finished, by name.
        processes: jobs at a time.
        lock: of `alone`.

    Returns: name -> why it failed, for each job that did.
    """
    took = [result.seconds for result in done.values()]
    finished, failed = set(done), dict[str, str]()
    stop, begun = Event(), time.monotonic()
    waiting, running = list(left), dict[Future[Result], Job]()
    with ThreadPoolExecutor(processes) as pool:
        try:
            while waiting or running:
                for job in [job for job in waiting if _blocker(job, failed)]:
                    failed[job.name] = f"{job.name} needs {_blocker(job, failed)}"
                    waiting.remove(job)
                ready = [job for job in waiting if all(job.name_of(row) in finished for row in job.needs)]
                for job in ready[: processes - len(running)]:
                    waiting.remove(job)
                    threads = max(1, (os.cpu_count() or 1) // processes)
                    running[pool.submit(_call, study, job, threads, stop, lock)] = job
                for future in wait(running, return_when=FIRST_COMPLETED).done if running else ():
                    job = running.pop(future)
                    try:
                        result = future.result()
                    except UserError as error:
                        failed[job.name] = str(error)
                        print(f"FAILED {error}", flush=True)
                        continue
                    append_result(Path(study.out), result)
                    finished.add(job.name)
                    took.append(result.seconds)
                    _tell(job, result, took, len(waiting) + len(running), processes, time.monotonic() - begun)
        except BaseException:
            stop.set()  # Ctrl-C: end the running commands, so that leaving the pool does not wait for them
            raise
    return failed


def _blocker(job: Job, failed: dict[str, str]) -> str | None:
    return next((row for row in job.needs if job.name_of(row) in failed), None)


def _tell(job: Job, result: Result, took: list[float], left: int, processes: int, spent: float) -> None:
    minutes = left * sum(took) / len(took) / processes / 60
    told = [f"{name} {value:.3f}" for name, value in result.figures.items() if isinstance(value, float)]
    told += [f"{len(result.arms)} arms"] if result.arms else []
    time_left = f"{spent / 60:.0f} min so far, {left} jobs left, about {minutes:.0f} min"
    print(f"{job.name}: {', '.join(told) or 'done'} ({result.seconds:.0f} s; {time_left})", flush=True)


def _call(study: Study, job: Job, threads: int, stop: Event, lock: Lock) -> Result:
    """Call a job's commands one after another; their output goes to `log.txt` in its folder.

    A command ends when this process ends, even if it is killed, and holds the study's lock until then.
    """
    begun = time.monotonic()
    job.folder.mkdir(parents=True, exist_ok=True)
    log = job.folder / "log.txt"
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ, VARIABLE: str(os.getpid())}
    held = () if lock.descriptor is None else (lock.descriptor,)
    with open(log, "ab") as file:
        for words in job.commands:
            called = [*words, *job.beside]
            file.write(f"$ python -m lit_safety {shlex.join(called)}\n".encode())
            file.flush()
            process = subprocess.Popen(
                [*PROGRAM, *called], stdout=file, stderr=subprocess.STDOUT, env=environment, pass_fds=held
            )
            while (code := _exit_code(process)) is None:
                if stop.is_set():
                    process.terminate()
                    process.wait()
                    raise UserError(f"{job.name}: interrupted")
            if code != 0:
                raise UserError(
                    f"{job.name}: `{words[0]}` ended with status {code}: {_last_line(log)} (whole log: {log})"
                )
    return collect(study, job, time.monotonic() - begun)


def _exit_code(process: subprocess.Popen[bytes]) -> int | None:
    try:
        return process.wait(POLL)
    except subprocess.TimeoutExpired:
        return None


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][-300:] if lines else "it printed nothing"
