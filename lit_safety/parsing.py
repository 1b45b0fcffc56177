"""Command lines whose mistakes come out as one clear line. Needs no torch."""

from __future__ import annotations

from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from lit_safety.errors import UserError


class SingleLineErrors:
    """Mixin for parsers: a parsing error becomes a `UserError` of one line instead of usage and traceback."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(" ".join(str(message).split())) from ex


class SingleLineErrorParser(SingleLineErrors, ArgumentParser):
    """jsonargparse's parser with one-line errors."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
