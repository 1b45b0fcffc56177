"""What a study file says."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, Namespace

from lit_safety.bounded import refuse_duplicate_keys
from lit_safety.errors import UserError
from lit_safety.parsing import SingleLineErrorParser
from lit_safety.study.pictures import Growth, HeatMap, check_pictures
from lit_safety.text_files import read_text

Options = dict[str, Any]
#: `{folder:NAME}`, the folder of the row NAME.
FOLDER_OF = re.compile(r"\{folder:([^{}]+)\}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*\Z")
#: [FILE#][max:|mean:|each:]a.b.0
_PLACE = re.compile(r"([^#]+#)?((max|mean|each):)?[^:#]+\Z")


@dataclass(frozen=True)
class Study:
    """A study file.

    In every text of `rows`, `{folder}` is the folder of the job itself, `{seed}` its seed, `{folder:NAME}` the folder
    of the row NAME at the same seed, which is then done first, and `{NAME}` what `texts` says for NAME at that seed.
    """

    out: str
    """Folder of the results file, the table, the plots and of each job's own folder."""
    rows: dict[str, dict[str, Options]]
    """Name of a row -> command -> its options, in the order in which the commands are called. `evaluate@small` is the
    command evaluate under a name of its own, for a row that calls it twice."""
    figures: dict[str, str]
    """Column of the table -> where its number stands in the row's `metrics`, such as `aligned.ip`,
    `differences.aligned.ip.interval.0` or `max:aligned.ip_by_category`. With `{arm}` in it (`arms.{arm}.ip`) the job
    gives a row of the table for each arm of its metrics but the base. `FILE#place` looks into another JSON file, and
    `each:place` takes all numbers there by their names, for the heat map."""
    metrics: str = "{folder}/report/metrics.json"
    """The JSON file that a job leaves."""
    defaults: dict[str, Options] = field(default_factory=dict)
    """Command -> options that each of its calls gets; a row's own options replace them."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Every row is done once for each."""
    row_seeds: dict[str, list[int]] = field(default_factory=dict)
    """Rows with seeds of their own."""
    texts: dict[str, list[str]] = field(default_factory=dict)
    """Name -> what `{name}` stands for at each of `seeds`, in their order."""
    prepare: list[str] = field(default_factory=list)
    """Rows that others need and that have no figures: what they leave is not looked at."""
    baseline: dict[str, str] = field(default_factory=dict)
    """Column -> where the same figure of the base stands, shown in the table's first row."""
    percent: list[str] = field(default_factory=list)
    """Columns that are shares, shown in percent."""
    pareto: list[str] = field(default_factory=list)
    """Two columns, drawn against each other: the lower the better, then the higher the better."""
    heatmaps: dict[str, HeatMap] = field(default_factory=dict)
    """Name -> what `heatmap-NAME.png` shows."""
    growth: Growth | None = None
    """`growth.png`."""

    def calls(self, row: str) -> list[tuple[str, Options]]:
        """A row's commands with all their options, the defaults included."""
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
    if not Path(path).is_file():
        raise UserError(f"no study file {path}; those that are shipped stand in configs/studies")
    parser = SingleLineErrorParser(exit_on_error=False)
    parser.add_class_arguments(Study)
    try:
        refuse_duplicate_keys(read_text(path))
        given = {key: _plain(value) for key, value in vars(parser.parse_path(path)).items()}
        given["heatmaps"] = {name: HeatMap(**one) for name, one in given["heatmaps"].items()}
        given["growth"] = Growth(**given["growth"]) if given["growth"] else None
        study = Study(**given)
        check_pictures(study.heatmaps, study.growth, study.rows, study.figures)
    except (ArgumentError, UserError, TypeError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())
        raise UserError(said if said.startswith(f"{path}: ") else f"{path}: {said}") from error
    _check(path, study)
    return study


def _plain(value: Any) -> Any:
    """Without the namespaces that jsonargparse makes of mappings with a class_path."""
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list) else value


def _check(path: str, study: Study) -> None:
    """Complain about a name that the study does not know, or a value that is not what it must be."""
    for name in study.rows:
        if not _NAME.match(name):
            raise UserError(f"{path}: the row {name!r} may hold only letters, digits and ._+-: it names a folder")
    for name in (*study.row_seeds, *study.prepare, *(need for row in study.rows for need in study.needed(row))):
        if name not in study.rows:
            raise UserError(f"{path}: speaks of a row {name!r} that it does not have")
    for column, place in (*study.figures.items(), *study.baseline.items()):
        if not _PLACE.match(place):
            raise UserError(f"{path}: the figure {column!r} stands at {place!r}, which is no [FILE#][max:]key.key")
    for name, texts in study.texts.items():
        if len(texts) != len(study.seeds):
            raise UserError(f"{path}: `texts` has {len(texts)} values of {name} for {len(study.seeds)} seeds")
    if study.pareto and (len(study.pareto) != 2 or set(study.pareto) - set(study.figures)):
        raise UserError(f"{path}: pareto must name two of the columns {', '.join(study.figures)}")
