"""A study file, its plots, and the jobs that follow from it."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, Namespace

from lit_safety.core.check_config import check_command
from lit_safety.core.errors import UserError
from lit_safety.core.parsing import SingleLineErrorParser
from lit_safety.core.shipped import shipped
from lit_safety.core.text import decode_text, load_yaml, read_text, refuse_duplicate_keys


@dataclass(frozen=True)
class HeatMap:
    """A heat map: a row's arms against the names of an `each:` column."""

    row: str
    """Whose arms."""
    figure: str
    """The column."""


@dataclass(frozen=True)
class Growth:
    """A growth plot: a column against a number that each row has, one line an arm."""

    figure: str
    """The column."""
    label: str
    """The name of that number."""
    rows: dict[str, int]
    """Row -> its number."""
    common: dict[str, str] = field(default_factory=dict)
    """A row whose arms are not lines -> the column whose mean over its arms is the common point of all lines."""


def check_plots(
    heatmaps: Mapping[str, HeatMap], growth: Growth | None, rows: Collection[str], columns: Collection[str]
) -> None:
    """Refuse names that are not in the study.

    Raises:
        UserError: there is no such row or column.
    """
    for key, name, row in _spoken_of(heatmaps, growth):
        if name not in (rows if row else columns):
            known = f"row; rows are {', '.join(rows)}" if row else f"column; columns are {', '.join(columns)}"
            raise UserError(f"{key}: {name!r} is not a {known}")


def _spoken_of(heatmaps: Mapping[str, HeatMap], growth: Growth | None) -> Iterator[tuple[str, str, bool]]:
    """Key of the study file, name, and whether it must be a row."""
    for name, heatmap in heatmaps.items():
        yield f"heatmaps.{name}.row", heatmap.row, True
        yield f"heatmaps.{name}.figure", heatmap.figure, False
    if growth is not None:
        yield "growth.figure", growth.figure, False
        yield from (("growth.rows", row, True) for row in growth.rows)
        yield from (("growth.common", row, True) for row in growth.common)
        yield from (("growth.common", column, False) for column in growth.common.values())


# The study file.


Options = dict[str, Any]
#: `{folder:NAME}`, the folder of the row NAME.
FOLDER_OF = re.compile(r"\{folder:([^{}]+)\}")
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9 _.+=-]*[A-Za-z0-9_.+=-])?\Z")
#: [FILE#][max:|mean:|each:]a.b.0
_PLACE = re.compile(r"([^#]+#)?((max|mean|each):)?[^:#]+\Z")


@dataclass(frozen=True)
class Study:
    """A study file.

    In every text of `rows`, `{folder}` is the folder of the job itself, `{seed}` its seed, `{folder:NAME}` the folder
    of the row NAME at the same seed, which is then done first, and `{NAME}` the value of NAME in `texts` at that
    seed.
    """

    out: str
    """Folder of the results file, the table, the plots and of each job's own folder."""
    rows: dict[str, dict[str, Options]]
    """Name of a row -> command -> its options, in the order of the calls. `evaluate@small` is the command evaluate with
    another name, for a row that calls it twice."""
    figures: dict[str, str]
    """Column of the table -> the place of its number in the row's `metrics`, such as `aligned.ip`,
    `differences.aligned.ip.interval.0` or `max:aligned.ip_by_category`. With `{arm}` in it (`arms.{arm}.ip`) the job
    gives a row of the table for each arm of its metrics, except the base. `FILE#place` reads another JSON file,
    and takes all numbers there by their names, for the heat map."""
    metrics: str = "{folder}/report/metrics.json"
    """The JSON file that a job writes."""
    grid: dict[str, dict[str, dict[str, list[Any]]]] = field(default_factory=dict)
    """Name of a row -> command -> option -> its values. The row is replaced by one row for each combination of values,
    the values in its name: `sweep beta=100 lr=0.001`."""
    defaults: dict[str, Options] = field(default_factory=dict)
    """Command -> options for each of its calls; a row's own options replace them."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Every row is done once for each seed."""
    row_seeds: dict[str, list[int]] = field(default_factory=dict)
    """Rows with their own seeds."""
    texts: dict[str, list[str]] = field(default_factory=dict)
    """Name -> the value of `{name}` at each of `seeds`, in their order."""
    prepare: list[str] = field(default_factory=list)
    """Rows that others need and that have no figures: their metrics are not read."""
    baseline: dict[str, str] = field(default_factory=dict)
    """Column -> the place of the same figure of the base, shown in the table's first row."""
    percent: list[str] = field(default_factory=list)
    """Columns that are shares, shown in percent."""
    pareto: list[str] = field(default_factory=list)
    """Two columns that are plotted against each other: in the first lower is better, in the second higher is better."""
    heatmaps: dict[str, HeatMap] = field(default_factory=dict)
    """Name -> the content of `heatmap-NAME.png`."""
    growth: Growth | None = None
    """`growth.png`."""

    def calls(self, row: str) -> list[tuple[str, Options]]:
        """A row's commands with all their options, including the defaults."""
        found = []
        for called, options in self.rows[row].items():
            command = called.split("@")[0]
            merged = {**self.defaults.get(command, {}), **self.defaults.get(called, {}), **(options or {})}
            found.append((command, merged))
        return found

    def needed(self, row: str) -> tuple[str, ...]:
        """Rows whose folders a row's commands name, which must be done first at the same seed."""
        return tuple(dict.fromkeys(FOLDER_OF.findall(json.dumps(self.calls(row)))))

    def seeds_of(self, row: str) -> list[int]:
        """The seeds at which a row is done."""
        return self.row_seeds.get(row, self.seeds)


def load_study(path: str) -> Study:
    """Read and check a study file.

    Raises:
        UserError: the file is missing, a key stands twice, or a key or value is not what it must be.
    """
    if not Path(path := shipped(path)).is_file():
        raise UserError(f"there is no study file {path}; the shipped ones are in configs/studies")
    check_command("lit_safety.study.plan:Study", ["--config", path])  # the parser imports the classes that rows name
    parser = SingleLineErrorParser(exit_on_error=False)
    parser.add_class_arguments(Study)
    try:
        refuse_duplicate_keys(read_text(path))
        given = {key: _plain(value) for key, value in vars(parser.parse_path(path)).items()}
        given["heatmaps"] = {name: HeatMap(**one) for name, one in given["heatmaps"].items()}
        given["growth"] = Growth(**given["growth"]) if given["growth"] else None
        study = spread(Study(**given))
        check_plots(study.heatmaps, study.growth, study.rows, study.figures)
    except (ArgumentError, UserError, TypeError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())
        raise UserError(said if said.startswith(f"{path}: ") else f"{path}: {said}") from error
    _check(path, study)
    return study


def spread(study: Study) -> Study:
    """The study in which each row with a grid is replaced by one row for each combination of the grid's values.

    Raises:
        UserError: the grid names an unknown row or command, or the values of an option are not a list.
    """
    rows: dict[str, dict[str, Options]] = {}
    became: dict[str, list[str]] = {}
    for name, commands in study.grid.items():
        if name not in study.rows:
            raise UserError(f"grid: names an unknown row {name!r}; rows are {', '.join(study.rows)}")
        for command, options in commands.items():
            if command not in study.rows[name]:
                raise UserError(
                    f"grid.{name}: the row does not call {command!r}; it calls {', '.join(study.rows[name])}"
                )
            for option, values in options.items():
                if not isinstance(values, list) or not values:
                    raise UserError(f"grid.{name}.{command}.{option}: must be a list of values, not {values!r}")
    for name, row in study.rows.items():
        axes = [
            (command, option, values)
            for command, options in study.grid.get(name, {}).items()
            for option, values in options.items()
        ]
        for combination in itertools.product(*(range(len(values)) for _, _, values in axes)):
            calls = {command: dict(options or {}) for command, options in row.items()}
            words = [name]
            for (command, option, values), number in zip(axes, combination, strict=True):
                calls[command][option] = values[number]
                words.append(f"{option.rpartition('.')[2]}={_short(values[number], number)}")
            full = " ".join(words)
            if full in rows:
                raise UserError(f"grid.{name}: two combinations of values have the same name {full!r}")
            rows[full] = calls
            became.setdefault(name, []).append(full)
    seeds = {one: value for name, value in study.row_seeds.items() for one in became.get(name, [name])}
    prepare = [one for name in study.prepare for one in became.get(name, [name])]
    return replace(study, rows=rows, row_seeds=seeds, prepare=prepare)


def _short(value: Any, number: int) -> str:
    """A value in a row's name; for a class its name, and for a long value its place in the list."""
    if isinstance(value, dict) and isinstance(value.get("class_path"), str):
        value = f"{value['class_path'].rpartition('.')[2]}-{number}" if "init_args" in value else value["class_path"]
    if isinstance(value, dict | list) or len(str(value)) > 40:
        return str(number)
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return re.sub(r"[^A-Za-z0-9_.+-]", "_", text.rpartition(".")[2] if _DOTTED.match(text) else text)


_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+\Z")


def _plain(value: Any) -> Any:
    """Without the namespaces that jsonargparse makes of mappings with a class_path."""
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list) else value


def _check(path: str, study: Study) -> None:
    """Refuse a name that the study does not know, or a value that is not valid."""
    for name in study.rows:
        if not _NAME.match(name):
            raise UserError(
                f"{path}: the row {name!r} may hold only letters, digits, blanks inside, and ._+-=, because it names "
                "a folder"
            )
    for name in (*study.row_seeds, *study.prepare, *(need for row in study.rows for need in study.needed(row))):
        if name not in study.rows:
            raise UserError(f"{path}: names an unknown row {name!r}")
    for column, place in (*study.figures.items(), *study.baseline.items()):
        if not _PLACE.match(place):
            raise UserError(
                f"{path}: the figure {column!r} has the place {place!r}, which is not of the form [FILE#][max:]key.key"
            )
    for name, texts in study.texts.items():
        if len(texts) != len(study.seeds):
            raise UserError(f"{path}: `texts` has {len(texts)} values of {name} for {len(study.seeds)} seeds")
    if study.pareto and (len(study.pareto) != 2 or set(study.pareto) - set(study.figures)):
        raise UserError(f"{path}: pareto must name two of the columns {', '.join(study.figures)}")


# The jobs of a study: every row at every seed, as command lines.


#: The option whose values are written without a name, one word each: `merge A B`.
WORDS = "words"


@dataclass(frozen=True)
class Job:
    """One row at one seed."""

    row: str
    seed: int
    folder: Path
    commands: tuple[tuple[str, ...], ...]
    """Argument lists for `python -m lit_safety`, in order."""
    metrics: Path | None
    """None: it has no figures."""
    needs: tuple[str, ...]
    """Rows that must be done first, at the same seed."""
    above: tuple[str, ...] = ()
    """Digests of these rows' jobs."""
    beside: tuple[str, ...] = ()
    """Further words of each command, which change nothing that it finds, such as how many processes it takes."""

    @property
    def name(self) -> str:
        return self.name_of(self.row)

    def name_of(self, row: str) -> str:
        """The name of a row's job at this seed."""
        return f"{row}/seed{self.seed}"

    @property
    def digest(self) -> str:
        """Changes if the commands or the contents of their config files change, or those of a needed row: then it is
        done again.

        The commands include the classes' own defaults, so a changed default also gives another digest.

        Raises:
            UserError: a config file is not YAML.
        """
        files = [
            word.partition("=")[2] for command in self.commands for word in command if word.startswith("--config=")
        ]
        contents = [_meaning(file, Path(file).read_bytes()) for file in files if Path(file).is_file()]
        parts = [self.commands, contents, *([self.above] if self.above else [])]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


@lru_cache
def _meaning(file: str, content: bytes) -> str:
    """The content of a YAML file, independent of its comments, the order of its keys and its layout."""
    try:
        return json.dumps(load_yaml(decode_text(content, file), file), sort_keys=True, default=str)
    except UserError:
        raise
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise UserError(f"{file} cannot be read as YAML: {' '.join(str(error).split())}") from error


def jobs_of(study: Study) -> list[Job]:
    """All jobs, seed after seed, rows in the file's order. The jobs that a job needs always come before it.

    Raises:
        UserError: rows need each other in a circle, or one needs a row at a seed that this row does not have.
    """
    rows = _in_order(study)
    seeds = sorted({seed for name in rows for seed in study.seeds_of(name)})
    jobs: dict[tuple[str, int], Job] = {}
    for seed in seeds:
        for name in rows:
            if seed in study.seeds_of(name):
                needed = study.needed(name)
                for need in needed:
                    if (need, seed) not in jobs:
                        raise UserError(
                            f"the row {name} needs the row {need} at seed {seed}, but {need} does not have this seed; "
                            f"give {need} that seed in `row_seeds`, or take it from {name}"
                        )
                above = tuple(jobs[need, seed].digest for need in needed)
                jobs[name, seed] = _job(study, name, seed, above)
    return list(jobs.values())


def _in_order(study: Study) -> list[str]:
    order: list[str] = []

    def visit(name: str, waiting: tuple[str, ...]) -> None:
        if name in waiting:
            raise UserError(f"the rows {' -> '.join((*waiting, name))} need each other")
        if name not in order:
            for needed in study.needed(name):
                visit(needed, (*waiting, name))
            order.append(name)

    for name in study.rows:
        visit(name, ())
    return order


def _job(study: Study, row: str, seed: int, above: tuple[str, ...]) -> Job:
    def folder_of(name: str) -> Path:
        return Path(study.out) / name / f"seed{seed}"

    def fill(text: str) -> str:
        text = FOLDER_OF.sub(lambda found: str(folder_of(found[1])), text)
        text = text.replace("{folder}", str(folder_of(row))).replace("{seed}", str(seed))
        for name, texts in study.texts.items():
            if "{" + name + "}" in text:
                text = text.replace("{" + name + "}", _text_at(study, name, texts, row, seed))
        return text

    commands = tuple(
        tuple(fill(word) for word in [*command.split(), *words_of(options)]) for command, options in study.calls(row)
    )
    metrics = None if row in study.prepare else Path(fill(study.metrics))
    return Job(row, seed, folder_of(row), commands, metrics, study.needed(row), above)


def _text_at(study: Study, name: str, texts: list[str], row: str, seed: int) -> str:
    if seed not in study.seeds:
        raise UserError(f"the row {row} uses {{{name}}} at seed {seed}, for which `texts` has no value")
    return texts[study.seeds.index(seed)]


def words_of(options: Options) -> list[str]:
    """Options as words of a command line; a list under `config` is several `--config`, which come before the rest."""
    words: list[str] = [str(word) for word in options.get(WORDS, ())]
    for name, value in sorted(options.items(), key=lambda option: option[0] != "config"):
        if name == WORDS:
            continue
        several = value if name == "config" and isinstance(value, list) else [value]
        words += [f"--{name}={one if isinstance(one, str) else json.dumps(one)}" for one in several]
    return words
