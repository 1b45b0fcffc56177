"""The commands besides the trainer's: plain typed functions handed to jsonargparse. Importing this needs no torch."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from jsonargparse import CLI

from lit_safety.core.check_config import COMMANDS, check_words

#: Functions whose `out`, and `work` where they have one, have one writer at a time; True: it is a file, or a folder
#: that is replaced whole. What several processes share locks each one's own; `study run` hands its lock to its jobs.
WRITERS = {
    "attack": False,
    "build": False,
    "build_flow_twin": False,
    "check": False,
    "embed": False,
    "evaluate": False,
    "evaluate_users": False,
    "from_coprov2": False,
    "from_folder": False,
    "from_pickapic": False,
    "from_sage": False,
    "merge": True,
    "precompute": False,
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
    """The function, refused with a `UserError` while another process writes where it does."""

    @functools.wraps(function)
    def alone(*args: Any, **kwargs: Any) -> Any:
        from lit_safety.core.files import one_writer

        given = inspect.signature(function).bind(*args, **kwargs).arguments
        outs = [Path(given[name]) for name in ("out", "work") if given.get(name)]
        with one_writer(*outs, replaced=replaced):
            return function(*args, **kwargs)

    return alone


#: Commands that make a world -> those of their options that read what is made.
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
        from lit_safety.cli.evaluate_fit import from_fit

        rest = from_fit(rest)
    if command in ("attack", "evaluate") or list(arguments[:2]) == ["users", "evaluate"]:
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
