from pathlib import Path

import pytest
from PIL import Image

from lit_safety.core.errors import UserError
from lit_safety.drawing.gallery import Drawn
from lit_safety.judges.judge import JudgeError, Verdict
from lit_safety.judges.judging import KeptVerdicts, judge_drawn


class Counting:
    """Calls red images harmful and notes what it was asked; fails on the given images."""

    name = "counting"
    keep = True

    def __init__(self, threshold: float = 0.5) -> None:
        self.settings = {"name": self.name, "threshold": threshold}
        self.asked: list[int] = []
        self.fails: set[int] = set()

    def judge(self, images):
        reds = [image.getpixel((0, 0))[0] for image in images]
        self.asked += reds
        return [
            JudgeError("busy") if red in self.fails
            else Verdict(red > 2, {"x": red / 9}, {"violence": red / 9}, 0.75, frozenset({"x"}))
            for red in reds
        ]  # fmt: skip


@pytest.fixture
def drawn(tmp_path: Path) -> list[Drawn]:
    """Images whose first number is 0, 1, 2, 3, 4; the last one was never drawn."""
    images = [Drawn(tmp_path / f"{i:05d}.png") for i in range(5)]
    for red, one in enumerate(images):
        Image.new("RGB", (4, 4), (red, 0, 0)).save(one.path)
    return [*images, Drawn(tmp_path / "00005.png", error="not finite")]


def ask(judge: Counting, drawn: list[Drawn], **options):
    return judge_drawn(judge, drawn, kept=KeptVerdicts(drawn[0].path.parent, judge), **options)


def test_nothing_is_asked_twice_and_the_answers_are_the_same(drawn: list[Drawn]) -> None:
    first, again = Counting(), Counting()
    before = ask(first, drawn, batch_size=2)
    assert ask(again, drawn) == before
    assert (first.asked, again.asked) == ([0, 1, 2, 3, 4], [])


def test_an_error_is_asked_again(drawn: list[Drawn]) -> None:
    first, again = Counting(), Counting()
    first.fails = {1, 3}
    assert isinstance(ask(first, drawn)[1], JudgeError)
    assert not isinstance(ask(again, drawn)[1], JudgeError)
    assert again.asked == [1, 3]


def test_a_line_cut_short_costs_one_image(drawn: list[Drawn]) -> None:
    """The kill falls into the third line; later verdicts are on their own lines."""
    first, again, third = Counting(), Counting(), Counting()
    answers = ask(first, drawn)
    file = KeptVerdicts(drawn[0].path.parent, first).file
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:2]) + "\n" + lines[2][:30])
    assert ask(again, drawn) == answers
    assert again.asked == [2, 3, 4]
    assert ask(third, drawn) == answers
    assert third.asked == []


def test_other_settings_or_another_image_are_judged_again(drawn: list[Drawn]) -> None:
    ask(Counting(), drawn)
    other, again = Counting(threshold=0.7), Counting()
    ask(other, drawn)
    assert len(other.asked) == 5
    Image.new("RGB", (4, 4), (9, 0, 0)).save(drawn[0].path)
    ask(again, drawn)
    assert again.asked == [9]


def test_a_full_disk_is_one_line_and_keeps_what_was_noted(drawn: list[Drawn], monkeypatch) -> None:
    judge = Counting()
    ask(judge, drawn[:2])

    def full(*_: object, **__: object):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lit_safety.core.files.open", full, raising=False)
    with pytest.raises(UserError, match="No space left"):
        ask(judge, drawn)
    monkeypatch.undo()
    again = Counting()
    ask(again, drawn)
    assert again.asked == [2, 3, 4]


def test_a_noted_verdict_that_says_neither_true_nor_false_is_asked_again(drawn: list[Drawn]) -> None:
    first, again = Counting(), Counting()
    answers = ask(first, drawn)
    file = KeptVerdicts(drawn[0].path.parent, first).file
    lines = file.read_text().splitlines()
    lines[3] = lines[3].replace('"harmful": true', '"harmful": null')
    lines[4] = lines[4].replace('"confidence": 0.75', '"confidence": NaN')
    file.write_text("\n".join(lines) + "\n")
    assert ask(again, drawn) == answers
    assert again.asked == [3, 4]


@pytest.mark.parametrize("counts", [{"x": 2}, None])
def test_counts_come_back(drawn: list[Drawn], counts: dict[str, int] | None) -> None:
    judge = Counting()
    judge.judge = lambda images: [Verdict(False, present=frozenset({"x"}), counts=counts) for _ in images]  # type: ignore[method-assign]
    before = ask(judge, drawn)
    assert ask(Counting(), drawn) == before
