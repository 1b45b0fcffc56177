"""Command lines whose mistakes come out as one clear line. Needs no torch."""

from __future__ import annotations

import ast
import re
import sys
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from lit_safety.bounded import bound_command_lines, check_values, check_words
from lit_safety.errors import UserError

# Lines of jsonargparse's messages that describe its search through a union's types and not the mistake itself.
_SEARCH = re.compile(
    r"Parser key |Does not validate against any|Subtypes:|Errors:$|Given value|Expected a <class 'NoneType'>"
)


def shorten(message: str) -> str:
    """One line out of jsonargparse's report: the YAML key and what is wrong with its value.

    jsonargparse reports every type that it tried for every key on the way down; the keys on the way and the
    innermost reasons are what a person needs.
    """
    keys = list(dict.fromkeys(re.findall(r'Parser key "([^"]+)"', message)))
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    reasons = [line for line in dict.fromkeys(lines) if line and not _SEARCH.match(line)]
    if not reasons:
        return " ".join(message.split())
    if keys:
        keys += _below(message)
    where = [f"`{'.init_args.'.join(keys)}`:"] if keys else []
    if (missing := _missing_package(" ".join(reasons))) is not None:
        reasons = [missing]
    return " ".join(" ".join([*where, *reasons]).split())


def _missing_package(reason: str) -> str | None:
    """What to do about a class whose package is not installed; None: something else is wrong."""
    package = re.search(r"No module named '(\w+)'", reason)
    given = re.search(r"class_path=?\W+([\w.]+)", reason)
    if package is None or given is None or given[1].partition(".")[0] != package[1]:
        return None
    return (
        f"{given[1]} is of the package {package[1]}, which is not installed: `pip install {package[1]}`; if it is your "
        "own file, run in its folder or name that folder in PYTHONPATH"
    )


def _below(message: str) -> list[str]:
    """Keys below the last one that jsonargparse names, on the way to an option that is not accepted.

    It names no key whose value is a class that is made later (an optimizer, a scheduler): only the whole value that it
    was given shows where the option stood.
    """
    option = re.search(r"Option '([^']+)' is not accepted", message)
    if option is None:
        return []
    dotted = re.search(rf"NestedArg\(key='([^']+)\.{re.escape(option[1])}'", message)
    if dotted is not None:
        return [key for key in dotted[1].split(".") if key != "init_args"]
    for given in re.findall(r"Given value: (\{.*\})", message):
        try:
            way = _way(ast.literal_eval(given), option[1])
        except (ValueError, SyntaxError):
            continue
        if way is not None:
            return [key for key in way if key != "init_args"]
    return []


def _way(value: object, option: str) -> list[str] | None:
    """The keys that lead to the mapping in which ``option`` stands."""
    if not isinstance(value, dict):
        return None
    if option in value:
        return []
    for key, inner in value.items():
        if (way := _way(inner, option)) is not None:
            return [str(key), *way]
    return None


class SingleLineErrors:
    """Mixin for parsers: a parsing error becomes a `UserError` of one line instead of usage and traceback."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        # Messages of nested parsers come back here inside the outer one's; only the outermost is shortened, by the
        # command line, so that no key on the way is lost.
        raise UserError(str(message)) from ex

    def parse_args(self, args: Any = None, *more: Any, **options: Any) -> Any:
        """As jsonargparse's, within the bounds of `bounded`.

        Raises:
            UserError: the command line is wrong, names a FIFO or a device, or a YAML stands for too much.
        """
        bound_command_lines()
        check_words(sys.argv[1:] if args is None else [str(word) for word in args])
        parsed = super().parse_args(args, *more, **options)  # type: ignore[misc]
        check_values(parsed.as_dict())
        return parsed

    def parse_object(self, cfg_obj: Any, *more: Any, **options: Any) -> Any:
        """The same for what a file says."""
        bound_command_lines()
        parsed = super().parse_object(cfg_obj, *more, **options)  # type: ignore[misc]
        check_values(parsed.as_dict())
        return parsed


class SingleLineErrorParser(SingleLineErrors, ArgumentParser):
    """jsonargparse's parser with one-line errors."""
