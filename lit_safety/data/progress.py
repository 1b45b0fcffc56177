"""A progress line on stderr, so that what a command prints can be piped on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn


@contextlib.contextmanager
def counter(what: str, total: int | None = None) -> Iterator[Callable[[], None]]:
    """Show how far a command has come; the function this gives counts one pair.

    Args:
        what: what is being done, in a word.
        total: how many pairs there are, if that is known.
    """
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)
