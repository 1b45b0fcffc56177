"""Several processes that do attacks: what they say is heard, and they end with the command."""

from __future__ import annotations

import multiprocessing

import pytest

from lit_safety.attacks import AnySeed, processes
from lit_safety.attacks.run import AttackRun
from lit_safety.core.errors import UserError
from lit_safety.drawing.arms import Arm
from lit_safety.drawing.prompts import PromptCounts
from tests.attacks.conftest import DRAWING
from tests.drawing.test_processes import Ended


class Bar:
    """Keeps the messages that it gets."""

    def __init__(self) -> None:
        self.done, self.told = 0, ""

    def advance(self, count: int) -> None:
        self.done += count

    def tell(self, text: str) -> None:
        self.told = text


def test_idle_processes_get_the_next_attack_until_there_is_none() -> None:
    (ours, theirs), bar = multiprocessing.Pipe(), Bar()
    for said in (("tell", "step 1"), ("advance", 3), ("idle", None), ("advance", 4), ("idle", None)):
        theirs.send(said)
    process = Ended(0)
    waiting = [("seeds", ["aligned"])]

    def end() -> None:
        assert [theirs.recv() for _ in range(2)] == [("seeds", ["aligned"]), None]

    process.join = end  # type: ignore[method-assign]
    done = multiprocessing.Pipe()
    done[1].close()
    closer = _After(ours, theirs, 5)
    processes._listen({closer: process}, waiting, bar)
    assert (bar.done, bar.told, waiting) == (7, "step 1", [])


class _After:
    """A pipe whose other end is gone once so much was heard."""

    def __init__(self, ours, theirs, count: int) -> None:
        self.ours, self.theirs, self.left = ours, theirs, count

    def fileno(self) -> int:
        return self.ours.fileno() if self.left else self.theirs.fileno()

    def recv(self):
        if not self.left:
            raise EOFError
        self.left -= 1
        return self.ours.recv()

    def send(self, what) -> None:
        self.ours.send(what)


@pytest.mark.parametrize(
    ("says", "status", "expected"), [(("error", "disk full"), 0, "disk full"), (None, -9, "process 1 ended")]
)
def test_an_error_or_a_kill_ends_the_attacks(says, status: int, expected: str) -> None:
    ours, theirs = multiprocessing.Pipe()
    if says is not None:
        theirs.send(says)
    theirs.close()
    with pytest.raises(UserError, match=expected):
        processes._listen({ours: Ended(status)}, [], Bar())


def test_ctrl_c_leaves_no_process(tiny_pipeline, rows, red_judge, tmp_path, monkeypatch) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(processes, "_listen", stopped)
    run = AttackRun(str(tiny_pipeline), "x", rows, rows[:2], PromptCounts(), [red_judge], {"base": Arm()},
                    {"a": AnySeed(1), "b": AnySeed(2)}, DRAWING, tmp_path / "out", processes=2)  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        run.execute()
    assert not [one for one in multiprocessing.active_children() if one.name.startswith("attack")]
