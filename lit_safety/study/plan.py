"""What a study file says, and the jobs that follow from it."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, Namespace

from lit_safety.errors import UserError
from lit_safety.parsing import SingleLineErrorParser

Options = dict[str, Any]
_FOLDER_OF = re.compile(r"\{folder:([^{}]+)\}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*\Z")
#: The option whose values are written without a name, one word each: `merge A B`.
WORDS = "words"


@dataclass(frozen=True)
class Study:
    """A study file.

    In every text of `rows`, `{folder}` is the folder of the job itself, `{seed}` its seed, and `{folder:NAME}` the
    folder of the row NAME at the same seed, which is then done first.
    """

    out: str
    """Folder of the results file, the table, the plots and of each job's own folder."""
    rows: dict[str, dict[str, Options]]
    """Name of a row -> command -> its options, in the order in which the commands are called. `evaluate@small` is the
    command evaluate under a name of its own, for a row that calls it twice."""
    figures: dict[str, str]
    """Column of the table -> where its number stands in the row's `metrics`, such as `aligned.ip`,
    `differences.aligned.ip.interval.0` or `max:aligned.ip_by_category`."""
    metrics: str = "{folder}/report/metrics.json"
    """The JSON file that a job leaves."""
    defaults: dict[str, Options] = field(default_factory=dict)
    """Command -> options that each of its calls gets; a row's own options replace them."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Every row is done once for each."""
    row_seeds: dict[str, list[int]] = field(default_factory=dict)
    """Rows with seeds of their own."""
    baseline: dict[str, str] = field(default_factory=dict)
    """Column -> where the same figure of the base stands, shown in the table's first row."""
    percent: list[str] = field(default_factory=list)
    """Columns that are shares, shown in percent."""
    pareto: list[str] = field(default_factory=list)
    """Two columns, drawn against each other: the lower the better, then the higher the better."""


@dataclass(frozen=True)
class Job:
    """One row at one seed."""

    row: str
    seed: int
    folder: Path
    commands: tuple[tuple[str, ...], ...]
    """Argument lists for `python -m lit_safety`, in order."""
    metrics: Path
    needs: tuple[str, ...]
    """Rows that must be done first, at the same seed."""

    @property
    def name(self) -> str:
        return f"{self.row}/seed{self.seed}"

    @property
    def digest(self) -> str:
        """Differs when the commands or their config files do, so that a changed row is done again."""
        files = [
            word.partition("=")[2] for command in self.commands for word in command if word.startswith("--config=")
        ]
        contents = [Path(file).read_text(encoding="utf-8") for file in files if Path(file).is_file()]
        return hashlib.sha256(json.dumps([self.commands, contents]).encode()).hexdigest()[:12]


def load_study(path: str) -> Study:
    """Read and check a study file.

    Raises:
        UserError: the file is missing, or a key or value is not what it must be.
    """
    if not Path(path).is_file():
        raise UserError(f"no study file {path}; those that are shipped stand in configs/studies")
    parser = SingleLineErrorParser(exit_on_error=False)
    parser.add_class_arguments(Study)
    try:
        study = Study(**{key: _plain(value) for key, value in vars(parser.parse_path(path)).items()})
    except (ArgumentError, UserError, TypeError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from error
    for name in study.rows:
        if not _NAME.match(name):
            raise UserError(f"{path}: the row {name!r} may hold only letters, digits and ._+-: it names a folder")
    for name in (*study.row_seeds, *(n for row in study.rows.values() for n in _needed(row))):
        if name not in study.rows:
            raise UserError(f"{path}: speaks of a row {name!r} that it does not have")
    if study.pareto and (len(study.pareto) != 2 or set(study.pareto) - set(study.figures)):
        raise UserError(f"{path}: pareto must name two of the columns {', '.join(study.figures)}")
    return study


def _plain(value: Any) -> Any:
    """Without the namespaces that jsonargparse makes of mappings with a class_path."""
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list) else value


def jobs_of(study: Study) -> list[Job]:
    """All jobs, seed after seed, rows in the file's order; what a job needs always stands before it.

    Raises:
        UserError: rows need each other in a circle.
    """
    rows = _in_order(study)
    seeds = sorted({seed for name in rows for seed in study.row_seeds.get(name, study.seeds)})
    return [
        _job(study, name, seed) for seed in seeds for name in rows if seed in study.row_seeds.get(name, study.seeds)
    ]


def _in_order(study: Study) -> list[str]:
    order: list[str] = []

    def visit(name: str, waiting: tuple[str, ...]) -> None:
        if name in waiting:
            raise UserError(f"the rows {' -> '.join((*waiting, name))} need each other")
        if name not in order:
            for needed in _needed(study.rows[name]):
                visit(needed, (*waiting, name))
            order.append(name)

    for name in study.rows:
        visit(name, ())
    return order


def _needed(row: dict[str, Options]) -> list[str]:
    return list(dict.fromkeys(_FOLDER_OF.findall(json.dumps(row))))


def _job(study: Study, row: str, seed: int) -> Job:
    def folder_of(name: str) -> Path:
        return Path(study.out) / name / f"seed{seed}"

    def fill(text: str) -> str:
        text = _FOLDER_OF.sub(lambda found: str(folder_of(found[1])), text)
        return text.replace("{folder}", str(folder_of(row))).replace("{seed}", str(seed))

    commands = []
    for called, options in study.rows[row].items():
        command = called.split("@")[0]
        merged = {**study.defaults.get(command, {}), **study.defaults.get(called, {}), **(options or {})}
        commands.append(tuple(fill(word) for word in [*command.split(), *_arguments(merged)]))
    needs = tuple(_needed(study.rows[row]))
    return Job(row, seed, folder_of(row), tuple(commands), Path(fill(study.metrics)), needs)


def _arguments(options: Options) -> list[str]:
    """Options as words of a command line; a list under `config` is several `--config`."""
    words: list[str] = [str(word) for word in options.get(WORDS, ())]
    for name, value in options.items():
        if name == WORDS:
            continue
        several = value if name == "config" and isinstance(value, list) else [value]
        words += [f"--{name}={one if isinstance(one, str) else json.dumps(one)}" for one in several]
    return words
