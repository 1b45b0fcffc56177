"""The list of a dossier (configs/dossiers): its steps, and the job of each step."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import yaml
from pydantic import ConfigDict, TypeAdapter

from lit_safety.core.errors import UserError
from lit_safety.core.hashes import content_sha256, digest, file_sha256, files_below
from lit_safety.core.records import checked
from lit_safety.core.shipped import shipped
from lit_safety.core.text import load_yaml, read_text, refuse_duplicate_keys
from lit_safety.drawing.gallery import DrawingSettings
from lit_safety.study.plan import WORDS, Job, words_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lit_safety.evaluation.protocols import Protocol

RESULTS = {"evaluate": "metrics.json", "attack": "attacks.json", "judge-audit": "audit.json"}
"""Command -> the file that it writes last."""
OWN = ("pipeline", "adapter", "judge")
"""Names that a list may use in braces, in addition to its files."""
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9 ._+-]*[A-Za-z0-9._+-])?\Z")
_BRACES = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True)
class Step:
    """One command of a dossier."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")
    about: str
    """What it measures, for the page."""
    command: Literal["evaluate", "attack", "judge-audit"]
    options: dict[str, Any] = field(default_factory=dict)
    """Its options, in addition to those that every step of the command gets. `{NAME}` is the file of this name; without
    this file the step does not run, and the dossier says so."""
    optional: dict[str, Any] = field(default_factory=dict)
    """Options that are left out if their file was not given; the dossier says so."""


@dataclass(frozen=True)
class DossierList:
    """A list of steps."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")
    title: str
    files: dict[str, str]
    """Name of a file, which `--files.NAME` gives -> what it holds."""
    steps: dict[str, Step]


_RECORD = TypeAdapter(DossierList)


def load_list(given: str) -> tuple[DossierList, str]:
    """Read a list by its name or file; also returns the sha256 of its content without comments.

    Raises:
        UserError: the list does not exist, or a key or value of it is wrong.
    """
    path = given if given.endswith((".yaml", ".yml")) else f"dossiers/{given}.yaml"
    file = Path(shipped(path))
    if not file.is_file():
        raise UserError(f"--list {given}: there is no such list; quick and full are shipped, or give a YAML like those "
                        "in configs/dossiers")  # fmt: skip
    try:
        text = read_text(file)
        refuse_duplicate_keys(text)
        said = load_yaml(text, str(file))
    except (OSError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"--list {file}: cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(said, dict):
        raise UserError(f"--list {file}: must hold title, files and steps, as configs/dossiers/* do")
    found = checked(_RECORD, said, f"--list {file}")
    if not found.steps:
        raise UserError(f"{file}: `steps` is empty")
    for name, step in found.steps.items():
        if not _NAME.match(name):
            raise UserError(
                f"{file}: the step {name!r} names a folder, so it may hold letters, digits, . _ + - and blanks inside"
            )
        for text in _texts([step.options, step.optional]):
            if unknown := [one for one in _BRACES.findall(text) if one not in (*OWN, *found.files)]:
                raise UserError(f"{file}: steps.{name}: there is no file {unknown[0]!r}; `files` has "
                                f"{', '.join(found.files)}")  # fmt: skip
    return found, digest(said)


@dataclass(frozen=True)
class Given:
    """The options of the command: the model, the judge, files, and how images are drawn."""

    pipeline: str
    judge: str
    adapter: str | None
    arms: dict[str, Any] | None
    second_judges: list[str] | None
    files: dict[str, str]
    drawing: DrawingSettings
    other_world: bool

    def named(self) -> dict[str, str]:
        """The values of the names in braces."""
        own = {"pipeline": self.pipeline, "judge": self.judge, "adapter": self.adapter}
        return {**{key: value for key, value in own.items() if value is not None}, **self.files}


@dataclass(frozen=True)
class StepJob(Job):
    """The job of a step. Its name does not contain a seed, because a dossier does not have one."""

    left_out: tuple[str, ...] = ()
    """Options that were left out because their file was not given."""

    def name_of(self, row: str) -> str:
        return row

    @property
    def result(self) -> Path:
        """The file that the command writes last."""
        return self.folder / RESULTS[self.commands[0][0]]


def folder_of(out: Path, step: str) -> Path:
    """The folder of a step."""
    return out / "steps" / step


def job_of(
    name: str, step: Step, given: Given, out: Path, above: tuple[str, ...], processes: int
) -> tuple[StepJob | None, str]:
    """The job of a step; or None and why it cannot be run.

    Args:
        name: the step's name.
        step: the step.
        given: the options of the command `dossier`.
        out: the dossier's folder.
        above: hashes of everything that its figures depend on, except its command.
        processes: the number of processes of the step's command.
    """
    named = given.named()
    missing = sorted({one for text in _texts(step.options) for one in _BRACES.findall(text) if one not in named})
    if missing:
        return None, f"{' and '.join(map(_option, missing))} was not given"
    options = shared_options(step, given) | {"out": str(folder_of(out, name))}
    options |= {key: _fill(value, named) for key, value in step.options.items()}
    left_out = []
    for key, value in step.optional.items():
        absent = sorted({one for text in _texts(value) for one in _BRACES.findall(text) if one not in named})
        if absent:
            left_out.append(f"--{key} ({' and '.join(map(_option, absent))} was not given)")
        else:
            options[key] = _fill(value, named)
    words = (step.command, *words_of(options))
    beside = (f"--processes={processes}",) if processes > 1 and step.command != "judge-audit" else ()
    return StepJob(name, 0, folder_of(out, name), (words,), None, (), above, beside, tuple(left_out)), ""


def shared_options(step: Step, given: Given) -> dict[str, Any]:
    """The options that every step of a command gets. A protocol keeps the settings that it states."""
    second = {} if given.second_judges is None else {"second_judges": given.second_judges}
    if step.command == "judge-audit":
        return {WORDS: [given.judge], **second}
    drawing = {one.name: getattr(given.drawing, one.name) for one in fields(given.drawing)}
    drawing = {key: value for key, value in drawing.items() if value is not None}
    found: dict[str, Any] = {"pipeline": given.pipeline, "judge": given.judge, **second}
    # null replaces the arms in the file of attacks, which are another model's
    found |= {"arms": given.arms or None} if given.arms or step.command == "attack" else {}
    found |= {"second_judges": None} if step.command == "attack" and not second else {}
    found |= {} if given.adapter is None else {"adapter": given.adapter}
    found |= {"other_world": True} if given.other_world else {}
    if (protocol := _protocol(step)) is not None:
        stated = protocol.drawing
        drawing = {key: value for key, value in drawing.items() if getattr(stated, key, "not stated") == "not stated"}
        if not isinstance(protocol.judge, str):
            found.pop("judge")
    return found | drawing


def _protocol(step: Step) -> Protocol | None:
    from lit_safety.evaluation.protocols import load_protocol

    return load_protocol(step.options["protocol"]) if "protocol" in step.options else None


def _option(name: str) -> str:
    return f"--{name}" if name in OWN else f"--files.{name}"


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _texts(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _texts(one)


def _fill(value: Any, named: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return _BRACES.sub(lambda found: named[found[1]], value)
    if isinstance(value, Mapping):
        return {key: _fill(one, named) for key, one in value.items()}
    return [_fill(one, named) for one in value] if isinstance(value, list | tuple) else value


# Hashes of everything that the figures depend on.


def whole_sha256(path: str) -> str | None:
    """sha256 of a file, or of a folder's files and their names. None: there is no such path, as for a hub id."""
    where = Path(shipped(path))
    if where.is_file():
        return file_sha256(where, remember=True)
    if not where.is_dir():
        return None
    return digest([[one.relative_to(where).as_posix(), file_sha256(one, remember=True)]
                   for one in sorted(files_below(where))])  # fmt: skip


def _named_by(path: str) -> dict[str, str | None]:
    """sha256 of each path in a YAML: prompts and images of attacks, or weights of a judge."""
    from lit_safety.drawing.worlds import paths_in

    file = Path(shipped(path))
    if file.suffix not in (".yaml", ".yml") or not file.is_file():
        return {}
    try:
        said = load_yaml(read_text(file), str(file))
    except (
        OSError,
        RecursionError,
        yaml.YAMLError,
    ):  # the command that uses the file raises the error that names the cause
        return {}
    # a file of attacks gives only its attacks; model, judge and arms are those of the dossier
    used = said.get("attacks", said) if isinstance(said, dict) else said
    return {one: whole_sha256(one) for one in sorted(set(paths_in(used)))}


def weights_sha256(path: str) -> str | None:
    """sha256 of a model's weights and configs, as in reports. None: the path does not exist."""
    where = Path(shipped(path))
    return content_sha256(where) if where.exists() else None


def code_sha256() -> str:
    """sha256 of this package's code."""
    top = Path(__file__).parents[1]
    kept = (one for one in sorted(top.rglob("*")) if one.suffix in (".py", ".html", ".css") and one.is_file())
    return digest([[one.relative_to(top).as_posix(), file_sha256(one)] for one in kept])


def hashes_of(given: Given, list_sha256: str, versions: Mapping[str, str]) -> dict[str, Any]:
    """All hashes of a dossier: code, list, model, adapters, judges, files.

    Raises:
        UserError: the pipeline, an adapter or a judge cannot be read.
    """
    from lit_safety.drawing.arms import adapter_sha256
    from lit_safety.drawing.pipelines import local_pipeline
    from lit_safety.drawing.worlds import paths_in

    judges = [given.judge, *(given.second_judges or ())]
    arms = given.arms or {}
    named = [*paths_in(arms), *(path for arm in arms.values() for path in (arm.get("adapters") or {}))]
    return {
        "code": code_sha256(),
        "list": list_sha256,
        "pipeline": content_sha256(local_pipeline(given.pipeline)),
        "adapter": None if given.adapter is None else adapter_sha256(given.adapter),
        "arms": {path: adapter_sha256(path) for path in sorted(set(named))},
        "judges": {path: weights_sha256(path) for path in judges},
        "files": {name: whole_sha256(path) for name, path in given.files.items()},
        "named_by_files": {name: found for name, path in given.files.items() if (found := _named_by(path))},
        "versions": dict(versions),
    }


def check_files(known: Sequence[str] | Mapping[str, str], files: Mapping[str, str]) -> None:
    """Refuse files that the list does not name.

    Raises:
        UserError: the message names the file and those of the list.
    """
    from lit_safety.core.meant import did_you_mean

    for name, path in files.items():
        if name not in known:
            raise UserError(f"--files.{name}: the list does not name such a file{did_you_mean(name, list(known))}")
        if not path or not isinstance(path, str):
            raise UserError(f"--files.{name}: must be the path of a file or folder, or a hub id")
