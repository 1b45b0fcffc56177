"""How far a command has come, on stderr, so that what it prints can be piped on: a bar, or lines in a log file."""

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
"""Seconds between two lines where stderr is not a terminal."""


class Shown(Protocol):
    """What a command tells its progress to."""

    def advance(self, count: int) -> None:
        """So many more are done."""

    def tell(self, text: str) -> None:
        """What it is at just now, within one of them."""


@contextlib.contextmanager
def counter(what: str, total: int | None = None) -> Iterator[Callable[[], None]]:
    """Show how far a command has come; the function this gives counts one pair.

    Args:
        what: what is being done, in a word.
        total: how many pairs there are, if that is known.
    """
    with shown(what, total, transient=True) as bar:
        yield lambda: bar.advance(1)


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show how many images of how many are done; the function this gives is told how many were done just now."""
    with shown(what, total) as bar:
        yield bar.advance


@contextlib.contextmanager
def shown(what: str, total: int | None, transient: bool = False) -> Iterator[Shown]:
    """The same, for commands that also say what they are at.

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
            self._first = self.done  # what was there already says nothing of the speed
        if now - self._told >= EVERY and self.done != self.total:
            self._told = now
            self._print(self._text(now))

    def tell(self, text: str) -> None:
        """What it is at just now; shown where a line is due."""
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


# No remarks of libraries between our own lines.


def quiet_libraries() -> None:
    """No remarks and no loading bars between our own progress bars."""
    import transformers

    remarks: Any = transformers.logging
    remarks.set_verbosity_error()  # before diffusers is imported, which sets off most of its remarks
    remarks.disable_progress_bar()
    from diffusers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
