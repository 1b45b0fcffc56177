"""The exceptions that end a command in one line: bad input, and a signal that asks the command to stop."""

from __future__ import annotations


class UserError(Exception):
    """Something the user gave is wrong.

    The message is one line that names the file, the sample or the YAML key, and says what to do. Anything else
    that goes wrong is a defect of ours and keeps its traceback.
    """


class Terminated(KeyboardInterrupt):
    """SIGTERM, as schedulers and containers send it. It passes through code as Ctrl-C does."""
