"""The exceptions that end a command in one line: bad input, and a signal that asks the command to stop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Something the user gave is wrong.

    The message is one line that names the file, the sample or the YAML key, and says what to do. Anything else
    that goes wrong is a defect of ours and keeps its traceback.
    """


class Terminated(KeyboardInterrupt):
    """SIGTERM, which schedulers and containers send. It is raised through code as Ctrl-C is."""


class Complaints:
    """What is wrong with the rows of one file, gathered so that one run reports all of it.

    Args:
        file: the file, with whose name the gathered errors begin.
        most: how many errors are kept; the others are counted.
    """

    def __init__(self, file: str, most: int = 10) -> None:
        self.file = file
        self.most = most
        self.count = 0
        self._kept: list[str] = []

    @contextmanager
    def gather(self) -> Iterator[None]:
        """Inside, a `UserError` is gathered and not raised."""
        try:
            yield
        except UserError as error:
            if str(error) in self._kept:  # an error about the whole file, which every row raises
                return
            self.count += 1
            if len(self._kept) < self.most:
                self._kept.append(str(error))

    def complain(self) -> None:
        """Raise what was gathered, if anything was.

        Raises:
            UserError: one line with the first errors, and how many there are.
        """
        if not self.count:
            return
        if self.count == 1:
            raise UserError(self._kept[0])
        bare = [one.removeprefix(self.file).lstrip(": ") for one in self._kept]
        more = f"; and {self.count - len(bare)} more" if self.count > len(bare) else ""
        raise UserError(f"{self.file}: {self.count} errors: {'; '.join(bare)}{more}")
