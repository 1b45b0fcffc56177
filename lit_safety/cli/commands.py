"""The commands besides the trainer's: plain typed functions handed to jsonargparse. Importing this needs no torch.

`evaluate --config fit.yaml`: the YAML of a fit says what is evaluated, so one file holds a run and its report.
"""

from __future__ import annotations

import functools
import inspect
import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import CLI

from lit_safety.core.check_config import COMMANDS, check_words
from lit_safety.core.errors import UserError
from lit_safety.core.shipped import shipped
from lit_safety.core.text import load_yaml, read_text

#: What a run exports -> the option that draws with it.
LEFT = {"adapter": "adapter", "pipeline": "arms.aligned.pipeline"}


def from_fit(arguments: Sequence[str]) -> list[str]:
    """The arguments of `evaluate`, with each `--config` of a fit replaced by the settings in its YAML.

    Pipeline, steps and guidance are the model's. Prompts, judge and the number of prompts are those of the callback
    `EvaluateOnTest`. The adapter is that of the newest run, and the report goes into this run's folder. Later arguments
    override earlier ones. Several such files are read as `fit` reads them, one over the other.

    Args:
        arguments: the words after `evaluate`.

    Raises:
        UserError: the file does not name a model, or there is no run of it with an export.
    """
    fits: dict[str, Any] = {}
    words: list[str] = []
    name, place = "", 0
    for word, config in _configs(arguments):
        if config is None or (said := _fit_in(config)) is None:
            words += word
        else:
            fits, name, place = _over(fits, said), config, len(words)
    return words if not name else [*words[:place], *_options(fits, name, words), *words[place:]]


def _configs(arguments: Sequence[str]) -> Iterator[tuple[list[str], str | None]]:
    """Words, and the file if they are a `--config`."""
    left = list(arguments)
    while left:
        word = left.pop(0)
        option, equals, value = word.partition("=")
        if option not in ("--config", "-c"):
            yield [word], None
        elif equals or not left:
            yield [word], value or None
        else:
            value = left.pop(0)
            yield [word, value], value


def _fit_in(config: str) -> dict[str, Any] | None:
    """The content of a fit's YAML; None: it is another command's, or not YAML, which the parser will report."""
    file = Path(shipped(config))
    if not file.is_file():
        return None
    try:
        said = load_yaml(read_text(file), str(file))
    except (OSError, UserError, RecursionError, yaml.YAMLError):
        return None
    return said if isinstance(said, dict) and isinstance(said.get("model"), dict) else None


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    both = {**below, **above}
    for key in below.keys() & above.keys():
        if isinstance(below[key], dict) and isinstance(above[key], dict):
            both[key] = _over(below[key], above[key])
    return both


def _at(said: Any, *way: str) -> Any:
    for key in way:
        said = said.get(key) if isinstance(said, dict) else None
    return said


def _options(said: dict[str, Any], file: str, given: Sequence[str]) -> list[str]:
    pipeline = _at(said, "model", "init_args", "pretrained")
    if not isinstance(pipeline, str):
        raise UserError(f"{file}: lacks `model.init_args.pretrained`, the model to evaluate")
    options: dict[str, Any] = {"pipeline": pipeline}
    named = {word.partition("=")[0] for word in given}
    callbacks = _at(said, "trainer", "callbacks")
    for one in callbacks if isinstance(callbacks, list) else [callbacks]:
        if str(_at(one, "class_path")).endswith("EvaluateOnTest"):
            options |= _at(one, "init_args") or {}
    asked = options.keys() | {word.removeprefix("--") for word in named}
    if absent := [f"--{key}" for key in ("prompts", "judge") if key not in asked and "--config" not in named]:
        raise UserError(
            f"{file}: lacks the callback `EvaluateOnTest` with these settings, so give {' and '.join(absent)}"
        )
    drawing = _at(said, "model", "init_args", "drawing")
    options |= {key: drawing[key] for key in ("steps", "guidance") if isinstance(drawing, dict) and key in drawing}
    run = _run(said, file)
    if "--out" not in named and run is not None:
        options["out"] = str(run / "report")
    if not any(word == "--adapter" or word.startswith("--arms") for word in named):
        left = next((one for one in LEFT if run is not None and (run / one).exists()), None)
        if run is None or left is None:
            latest = _latest(said)
            missing = (
                f"its newest run, {run}, did not export an adapter"
                if run is not None
                else f"there is no run of it, {latest if latest.is_absolute() else Path.cwd() / latest}"
            )
            raise UserError(
                f"{file}: {missing}: first, in this folder, `lit-safety fit --config {shlex.quote(file)}`, or give "
                "--adapter"
            )
        options[LEFT[left]] = str(run / left)
    return [f"--{name}={_word(value)}" for name, value in options.items()]


def _run(said: dict[str, Any], file: str) -> Path | None:
    """The folder of the newest run; None: there is none."""
    beside = Path(shipped(file)).parent
    if Path(file).name == "config.yaml" and any((beside / one).exists() for one in LEFT):
        return beside  # the file is a run's own config.yaml
    latest = _latest(said)
    return latest.parent / latest.readlink() if latest.is_symlink() else latest if latest.is_dir() else None


def _latest(said: dict[str, Any]) -> Path:
    root = _at(said, "run", "root") or "runs"
    name = _at(said, "run", "name") or str(_at(said, "model", "class_path")).rpartition(".")[2].lower()
    return Path(str(root)) / str(name) / "latest"


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


#: Functions whose `out`, and `work` if they have it, have one writer at a time; True: it is a file, or a folder that is
#: replaced whole. Commands of several processes lock each process's folder; `study run` passes its lock to its jobs.
WRITERS = {
    "attack": False,
    "build": False,
    "build_flow_twin": False,
    "check": False,
    "embed": False,
    "evaluate": False,
    "evaluate_users": False,
    "explain": False,
    "from_coprov2": False,
    "from_folder": False,
    "from_pickapic": False,
    "from_sage": False,
    "group": False,
    "judge_audit": False,
    "merge": True,
    "patch": True,
    "precompute": False,
    "repair": False,
    "sample": True,
    "score": False,
    "write_prompts": True,
    "write_users_world": True,
}

#: Commands whose first argument is a list: `compare A B` is read as `compare '["A", "B"]'`, which jsonargparse wants.
LISTS_FIRST = {"compare", "merge"}


def _load(where: str) -> Callable[..., Any]:
    module, name = where.split(":")
    function: Callable[..., Any] = getattr(import_module(module), name)
    return _alone(function, WRITERS[name]) if name in WRITERS else function


def _alone(function: Callable[..., Any], replaced: bool) -> Callable[..., Any]:
    """The function. It raises a `UserError` while another process writes to its output."""

    @functools.wraps(function)
    def alone(*args: Any, **kwargs: Any) -> Any:
        from lit_safety.core.files import one_writer

        given = inspect.signature(function).bind(*args, **kwargs).arguments
        outs = [Path(given[name]) for name in ("out", "work") if given.get(name)]
        with one_writer(*outs, replaced=replaced):
            return function(*args, **kwargs)

    return alone


#: Commands that make a world -> their options that read the world.
READ_OF_WORLDS = {
    "artworld": ["build.toy"],
    "toyworld": ["users.shards", "sheet.pipeline", "sheet.prompts", "flow-twin.toy"],
}


def run_command(arguments: Sequence[str]) -> None:
    """Run ``arguments[0]`` with the rest as its options."""
    from lit_safety.core.parsing import SingleLineErrorParser
    from lit_safety.core.shipped import check_worlds

    class Checked(SingleLineErrorParser):
        def parse_args(self, *args: Any, **named: Any) -> Any:
            parsed = super().parse_args(*args, **named)
            check_worlds(parsed.as_dict(), READ_OF_WORLDS.get(command))
            return parsed

    command, rest = arguments[0], list(arguments[1:])
    if command in LISTS_FIRST:
        rest = gather_list(rest)
    if command == "evaluate":
        rest = from_fit(rest)
    if command in ("attack", "dossier", "evaluate") or list(arguments[:2]) == ["users", "evaluate"]:
        from lit_safety.drawing.arms import gather_arms

        rest = gather_arms(rest)
    where = COMMANDS[command]
    if not {"-h", "--help"} & set(rest):
        check_words([command, *rest])
    components: Any = _load(where) if isinstance(where, str) else {k: _load(v) for k, v in where.items()}
    CLI(components, args=rest, prog=f"python -m lit_safety {command}", parser_class=Checked)


def gather_list(arguments: list[str]) -> list[str]:
    """Join the leading words that are not options into one JSON list."""
    count = next((i for i, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    if count == 0 or arguments[0].startswith("["):
        return arguments
    return [json.dumps(arguments[:count]), *arguments[count:]]
