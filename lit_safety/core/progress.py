"""Progress of a command, on stderr, so that its output can be piped: a bar, or lines in a log file."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

EVERY = 15.0
"""Seconds between two lines if stderr is not a terminal."""


class Shown(Protocol):
    """The object that a command reports its progress to."""

    def advance(self, count: int) -> None:
        """So many more are done."""

    def tell(self, text: str) -> None:
        """What it is doing now, within one of them."""


@contextlib.contextmanager
def counter(what: str, total: int | None = None) -> Iterator[Callable[[], None]]:
    """Show the progress of a command. The function that this gives counts one pair.

    Args:
        what: what is being done, in one word.
        total: how many pairs there are; None: that is not known.
    """
    with shown(what, total, transient=True) as bar:
        yield lambda: bar.advance(1)


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show how many images of all are done. The function that this gives takes how many were done since its last
    call."""
    with shown(what, total) as bar:
        yield bar.advance


@contextlib.contextmanager
def shown(what: str, total: int | None, transient: bool = False) -> Iterator[Shown]:
    """The same, for commands that also say what they are doing.

    Args:
        what: what is being done.
        total: how many there are; None: that is not known.
        transient: the bar goes when all is done.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        lines = Lines(what, total)
        yield lines
        lines.end()
        return
    columns = (SpinnerColumn(), TextColumn("{task.description:<16}", markup=False), BarColumn(), MofNCompleteColumn(),
               TimeRemainingColumn(), TextColumn("{task.fields[told]}", markup=False))  # fmt: skip
    with Progress(*columns, console=console, transient=transient) as bar:
        yield _Bar(bar, bar.add_task(what, total=total, told=""))


class _Bar:
    """A bar on a terminal."""

    def __init__(self, bar: Progress, task: TaskID) -> None:
        self._bar, self._task = bar, task

    def advance(self, count: int) -> None:
        self._bar.update(self._task, advance=count, told="")

    def tell(self, text: str) -> None:
        self._bar.update(self._task, told=text)


class Lines:
    """Progress for a file: a line when something begins, every `EVERY` seconds, and when it is done.

    Args:
        what: what is being done.
        total: how many there are; None: that is not known.
    """

    def __init__(self, what: str, total: int | None) -> None:
        self.what, self.total, self.done = what, total, 0
        self._begun = self._told = time.monotonic()
        self._first, self._at = 0, ""
        self._print("begins" if total is None else f"0 of {total}")

    def advance(self, count: int) -> None:
        """So many more are done."""
        self.done += count
        self._at = ""
        now = time.monotonic()
        if now - self._begun < 0.5:
            self._first = self.done  # what existed before does not count for the speed
        if now - self._told >= EVERY and self.done != self.total:
            self._told = now
            self._print(self._text(now))

    def tell(self, text: str) -> None:
        """What it is doing now; shown with the next line."""
        self._at = text
        now = time.monotonic()
        if now - self._told >= EVERY:
            self._told = now
            self._print(self._text(now))

    def end(self) -> None:
        """All is done."""
        self._print(f"{self.done} done in {time.monotonic() - self._begun:.0f} s")

    def _text(self, now: float) -> str:
        at = f", {self._at}" if self._at else ""
        if not self.total:
            return f"{self.done}{at}"
        text = f"{self.done} of {self.total} ({self.done / self.total:.0%})"
        if self.done > self._first:
            left = (self.total - self.done) * (now - self._begun) / (self.done - self._first)
            text += f", about {max(1, round(left / 60))} min left" if left > 45 else f", about {left:.0f} s left"
        return text + at

    def _print(self, text: str) -> None:
        print(f"{self.what}: {text}", file=sys.stderr, flush=True)


# Libraries print no remarks between our own lines.


def quiet_libraries() -> None:
    """Switch off the remarks and loading bars of libraries, which would stand between our own progress bars."""
    import transformers

    remarks: Any = transformers.logging
    remarks.set_verbosity_error()  # before diffusers is imported, because most remarks come with the import
    remarks.disable_progress_bar()
    from diffusers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
