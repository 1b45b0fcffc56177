"""A process that ends with the one that started it, even when that one is killed."""

from __future__ import annotations

import os
import signal
import threading
import time

#: The process id of who started this process and wants it to end with it.
VARIABLE = "LIT_SAFETY_ENDS_WITH"
#: How often to look, in seconds.
POLL = 0.5
#: Seconds to end in good order, such as to write a checkpoint, before it is ended at once.
GRACE = 120.0


def watch_parent() -> None:
    """Begin to look after the process that `VARIABLE` names, where it is set."""
    parent = os.environ.pop(VARIABLE, "")
    if parent.isdigit():
        end_with(int(parent))


def end_with(parent: int) -> None:
    """From now on send this process a SIGTERM when ``parent`` is no longer what started it."""
    threading.Thread(target=_watch, args=(parent,), daemon=True, name="watch parent").start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(128 + signal.SIGTERM)
