"""Which config file of a command line a complaint is about, so that it can be named."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lit_safety.core.errors import UserError
from lit_safety.core.shipped import shipped
from lit_safety.core.text import load_yaml, read_text

#: A key in a complaint: `a.b.c` between backticks, an option, or a dotted key of a fit.
_KEY = re.compile(
    r"`([A-Za-z_][\w.+-]*)`|--([A-Za-z_][\w.]*)|\b((?:model|data|trainer|run)\.[\w.]+)|^([A-Za-z_]\w*) (?=must|is|has)"
)
_OPTION = re.compile(r"Option '([^']+)'|accept option '([^']+)'")


def name_file(message: str, arguments: Sequence[str]) -> str:
    """The complaint with the file in front that gave the key it is about; as it is where no file did.

    Args:
        message: one line.
        arguments: the whole command line. What stands on it behind the file, and says the same key, is not the file's.
    """
    given = list(_given(arguments))
    files = [file for file, _ in given if file is not None]
    if not files or any(file in message for file in files):
        return message
    for key in _keys(message):
        for file, keys in reversed(given):
            if any(_same(key, one) for one in keys):
                return message if file is None else f"{file}: {message}"
    return message


def _keys(message: str) -> Iterator[str]:
    """Keys that a complaint names, the most exact first."""
    found = [next(filter(None, groups)) for groups in _KEY.findall(message)]
    for option in _OPTION.findall(message):
        name = next(filter(None, option))
        yield from (f"{key}.{name}" for key in found)
        yield name
    yield from found


def _same(asked: str, said: str) -> bool:
    """Whether a key of a file is the one that is asked for, or lies below it, or is its last part.

    Parts in the middle may be missing: jsonargparse leaves out names that the user gives, such as an arm's.
    """
    wanted, parts = _plain(asked).split("."), _plain(said).split(".")
    if len(wanted) == 1:
        return wanted[0] in (parts[0], parts[-1])
    left = iter(parts)
    return wanted[0] == parts[0] and all(part in left for part in wanted)


def _plain(key: str) -> str:
    return re.sub(r"\.init_args\b|\.class_path\b|\+", "", key)


def _given(arguments: Sequence[str]) -> Iterator[tuple[str | None, list[str]]]:
    """Each `--config` with its keys, and each option (None) with its own, in their order."""
    for i, word in enumerate(arguments):
        option, equals, value = word.partition("=")
        if not option.startswith("--") and option != "-c":
            continue
        if option not in ("--config", "-c"):
            yield None, [option.removeprefix("--")]
            continue
        file = value if equals else arguments[i + 1] if i + 1 < len(arguments) else ""
        yield file, list(_leaves(_read(file)))


def _read(file: str) -> Any:
    try:
        path = Path(shipped(file))
        return load_yaml(read_text(path), file) if path.is_file() else None
    except (OSError, UserError, ValueError, RecursionError, yaml.YAMLError):
        return None


def _leaves(value: Any, key: str = "") -> Iterator[str]:
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and any(isinstance(one, Mapping) for one in value):
        for number, inner in enumerate(value):
            yield from _leaves(inner, f"{key}.{number}")
    elif key:
        yield key
