"""The jobs that follow from a study: every row at every seed, as command lines."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import yaml

from lit_safety.bounded import load_yaml
from lit_safety.errors import UserError
from lit_safety.study.plan import FOLDER_OF, Options, Study
from lit_safety.text_files import decode_text

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

    @property
    def name(self) -> str:
        return f"{self.row}/seed{self.seed}"

    @property
    def digest(self) -> str:
        """Differs when the commands or what their config files say does, or a needed row's: then it is done again.

        The commands hold the classes' own defaults, so a changed default makes another job too.

        Raises:
            UserError: a config file is no YAML.
        """
        files = [
            word.partition("=")[2] for command in self.commands for word in command if word.startswith("--config=")
        ]
        contents = [_meaning(file, Path(file).read_bytes()) for file in files if Path(file).is_file()]
        parts = [self.commands, contents, *([self.above] if self.above else [])]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


@lru_cache
def _meaning(file: str, content: bytes) -> str:
    """What a YAML file says, whatever its comments, the order of its keys and its layout are."""
    try:
        return json.dumps(load_yaml(decode_text(content, file), file), sort_keys=True, default=str)
    except UserError:
        raise
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise UserError(f"{file} cannot be read as YAML: {' '.join(str(error).split())}") from error


def jobs_of(study: Study) -> list[Job]:
    """All jobs, seed after seed, rows in the file's order; what a job needs always stands before it.

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
                            f"the row {name} needs the row {need} at seed {seed}, which {need} does not have; "
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
        tuple(fill(word) for word in [*command.split(), *_arguments(options)]) for command, options in study.calls(row)
    )
    metrics = None if row in study.prepare else Path(fill(study.metrics))
    return Job(row, seed, folder_of(row), commands, metrics, study.needed(row), above)


def _text_at(study: Study, name: str, texts: list[str], row: str, seed: int) -> str:
    if seed not in study.seeds:
        raise UserError(f"the row {row} uses {{{name}}} at seed {seed}, for which `texts` says nothing")
    return texts[study.seeds.index(seed)]


def _arguments(options: Options) -> list[str]:
    """Options as words of a command line; a list under `config` is several `--config`, which come before the rest."""
    words: list[str] = [str(word) for word in options.get(WORDS, ())]
    for name, value in sorted(options.items(), key=lambda option: option[0] != "config"):
        if name == WORDS:
            continue
        several = value if name == "config" and isinstance(value, list) else [value]
        words += [f"--{name}={one if isinstance(one, str) else json.dumps(one)}" for one in several]
    return words
