"""Unknown names: which known name was probably meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args

#: Packages that a YAML may name and that may not be installed -> what installs them.
INSTALLED_BY = {
    "bitsandbytes": "bitsandbytes",
    "comet_ml": "comet-ml",
    "deepspeed": "deepspeed",
    "lion_pytorch": "lion-pytorch",
    "mlflow": "mlflow",
    "neptune": "neptune",
    "nudenet": "nudenet",
    "prodigyopt": "prodigyopt",
    "torch_fidelity": "torch-fidelity",
    "torch_optimizer": "torch-optimizer",
    "torchao": "torchao",
    "transformer_engine": "transformer-engine",
    "wandb": "wandb",
}


def did_you_mean(word: str, names: Iterable[str], listed: bool = True) -> str:
    """The end of a message: `; did you mean ...?`, or the names that exist, or nothing.

    Args:
        word: what was written.
        names: the known names.
        listed: list the names if none is close.
    """
    names = list(dict.fromkeys(names))
    share = 0.7 if len(word) > 4 else 0.6
    close = difflib.get_close_matches(word, names, 2, share)
    if not close:  # `LR` for `lr`, `Safre` for `SAFREE`
        plain = difflib.get_close_matches(word.casefold(), [name.casefold() for name in names], 2, share)
        close = [name for name in names if name.casefold() in plain]
    if close:
        return f"; did you mean {' or '.join(repr(one) for one in close)}?"
    return f"; known are {', '.join(names)}" if listed and 0 < len(names) <= 60 else ""


def no_package(path: str) -> str:
    """What to do if the package of a class is not found: a known package must be installed; any other name is taken as
    the user's own file.

    Args:
        path: the class, with its package.
    """
    package = path.partition(".")[0]
    if package in INSTALLED_BY:
        return f"{path} is of the package {package}, which is not installed: `pip install {INSTALLED_BY[package]}`"
    like = did_you_mean(package, _modules_here(), listed=False)
    return (
        f"{path}: there is no {package}.py and no folder {package} in the working folder {Path.cwd()}, and no "
        f"installed package of that name{like or '; run where your file is, or name its folder in PYTHONPATH'}"
    )


def _modules_here() -> list[str]:
    try:
        here = list(Path.cwd().iterdir())
    except OSError:
        return []
    return ["lit_safety", "torch", "lightning", *(one.stem for one in here if one.suffix == ".py" or one.is_dir())]


_UNKNOWN = re.compile(
    r"(?:unrecognized arguments: --|Option '|accept option '|invalid choice: ')([\w.-]+)(?:'? \(choose from ([^)]*)\))?"
)


def meant(message: str, parser: Any) -> str:
    """What was probably meant by an option, key or subcommand that a parser does not know; empty without such a one.

    Args:
        message: the parser's message.
        parser: the parser, with all its options.
    """
    found = _UNKNOWN.search(message)
    if found is None or "did you mean" in message:
        return ""
    names = re.findall(r"'([^']+)'", found[2]) if found[2] else list(_names(parser))
    word = found[1].rpartition(".")[2] if found[1] not in names and "." in found[1] else found[1]
    return did_you_mean(word, names, listed=False)


def _names(parser: Any) -> Iterator[str]:
    """All options of a parser and its subcommands, and the fields of dataclasses that they hold."""
    for action in parser._actions:
        yield action.dest.rpartition(".")[2]
        yield from (one.name for kind in _dataclasses(getattr(action, "_typehint", None)) for one in fields(kind))
        if isinstance(getattr(action, "choices", None), Mapping):
            for below in action.choices.values():
                yield from _names(below) if hasattr(below, "_actions") else ()


def _dataclasses(kind: Any) -> Iterator[type]:
    if is_dataclass(kind) and isinstance(kind, type):
        yield kind
    for one in get_args(kind):
        yield from _dataclasses(one)
