"""Command lines whose mistakes come out as one clear line. Needs no torch."""

from __future__ import annotations

import re
from typing import NoReturn

from jsonargparse import ArgumentParser

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
    where = [f"`{'.init_args.'.join(keys)}`:"] if keys else []
    return " ".join(" ".join([*where, *reasons]).split())


class SingleLineErrors:
    """Mixin for parsers: a parsing error becomes a `UserError` of one line instead of usage and traceback."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        # Messages of nested parsers come back here inside the outer one's; only the outermost is shortened, by the
        # command line, so that no key on the way is lost.
        raise UserError(str(message)) from ex


class SingleLineErrorParser(SingleLineErrors, ArgumentParser):
    """jsonargparse's parser with one-line errors."""
