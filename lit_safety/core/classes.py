"""A judge or a scorer described by a small YAML or JSON file: class_path and init_args, as in jsonargparse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lit_safety.core.errors import UserError
from lit_safety.core.own_classes import attributes_lacking
from lit_safety.core.text import load_yaml, read_text


def object_from_file(file: Path, protocol: Any, option: str, examples: str) -> Any:
    """What `file` describes by `class_path` and `init_args`.

    Args:
        file: YAML or JSON.
        protocol: what its class must be like.
        option: the option it was given by, for messages.
        examples: files that show how it is done, for messages.

    Raises:
        UserError: the file is unreadable or describes no such thing, or making it failed.
    """
    import yaml

    from lit_safety.core.parsing import SingleLineErrorParser, shorten

    try:
        keys: Any = load_yaml(read_text(file), str(file))
    except UserError as error:
        raise UserError(f"{option} {error}" if str(file) in str(error) else f"{option} {file}: {error}") from error
    except OSError as error:
        raise UserError(f"{option} {file}: cannot be read ({error.strerror})") from error
    except (RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{option} {file}: is not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(keys, dict) or "class_path" not in keys or keys.keys() - {"class_path", "init_args"}:
        raise UserError(f"{option} {file}: must hold `class_path` and `init_args` and nothing else, as {examples}")
    parser = SingleLineErrorParser(exit_on_error=False)
    parser.add_argument(option, type=protocol)
    name = option.removeprefix("--")
    try:
        parsed = parser.parse_object({name: keys})
    except UserError as error:
        raise UserError(f"{option} {file}: {shorten(str(error))}") from error
    try:
        made = parser.instantiate(parsed)[name]
    except UserError as error:
        raise UserError(f"{option} {file}: {error}") from error
    if (lack := attributes_lacking(made, protocol)) is not None:
        raise UserError(f"{option} {file}: {keys['class_path']} {lack}")
    return made
