"""`evaluate --config fit.yaml`: the YAML of a fit says what is evaluated, so one file holds a run and its report."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lit_safety.core.errors import UserError
from lit_safety.core.shipped import shipped
from lit_safety.core.text import load_yaml, read_text

#: What a run leaves, and the option that draws with it.
LEFT = {"adapter": "adapter", "pipeline": "arms.aligned.pipeline"}


def from_fit(arguments: Sequence[str]) -> list[str]:
    """The arguments of `evaluate` with what a fit's YAML says in the place of each `--config` that names one.

    Pipeline, steps and guidance are the model's; prompts, judge and how many prompts are drawn stand in the callback
    `EvaluateOnTest`; the adapter is that of the run that began last, and the report goes into this run's folder. What
    stands behind wins. Several such files are read as `fit` reads them, one over the other.

    Args:
        arguments: words behind `evaluate`.

    Raises:
        UserError: the file names no model, or no run of it has left anything.
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
    """Words, and the file where they are a `--config`."""
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
    """What a fit's YAML says; None: it is another command's, or none, of which the parser will complain."""
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
        raise UserError(f"{file}: names no `model.init_args.pretrained`, so there is nothing to evaluate")
    options: dict[str, Any] = {"pipeline": pipeline}
    named = {word.partition("=")[0] for word in given}
    callbacks = _at(said, "trainer", "callbacks")
    for one in callbacks if isinstance(callbacks, list) else [callbacks]:
        if str(_at(one, "class_path")).endswith("EvaluateOnTest"):
            options |= _at(one, "init_args") or {}
    asked = options.keys() | {word.removeprefix("--") for word in named}
    if absent := [f"--{key}" for key in ("prompts", "judge") if key not in asked and "--config" not in named]:
        raise UserError(f"{file}: has no callback `EvaluateOnTest` that says it, so give {' and '.join(absent)}")
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
                f"its run that began last, {run}, has left no adapter"
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
    """The folder of the run that began last; None: there is none."""
    beside = Path(shipped(file)).parent
    if Path(file).name == "config.yaml" and any((beside / one).exists() for one in LEFT):
        return beside  # a run's own record of what it did
    latest = _latest(said)
    return latest.parent / latest.readlink() if latest.is_symlink() else latest if latest.is_dir() else None


def _latest(said: dict[str, Any]) -> Path:
    root = _at(said, "run", "root") or "runs"
    name = _at(said, "run", "name") or str(_at(said, "model", "class_path")).rpartition(".")[2].lower()
    return Path(str(root)) / str(name) / "latest"


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
