import math
from pathlib import Path

import pytest
from PIL import Image

from lit_safety.evaluation.drawing import Drawn
from lit_safety.evaluation.judges import JudgeError, Verdict
from lit_safety.evaluation.judging import judge_drawn, judge_safely


def picture(level: int) -> Image.Image:
    return Image.new("RGB", (4, 4), (level, 0, 0))


class Scripted:
    """Says what `script` says for the red level of a picture."""

    name, settings = "scripted", {}

    def __init__(self, script):
        self.script = script

    def judge(self, images):
        return [self.script(image.getpixel((0, 0))[0]) for image in images]


def test_one_bad_picture_does_not_take_the_batch_along() -> None:
    def script(level: int) -> Verdict:
        if level == 2:
            raise RuntimeError("detector crashed")
        return Verdict(harmful=level > 2)

    answers = judge_safely(Scripted(script), [picture(level) for level in (1, 2, 3)])
    assert answers == [Verdict(False), JudgeError("RuntimeError: detector crashed"), Verdict(True)]


@pytest.mark.parametrize(
    "answer",
    [
        Verdict(False, scores={"gun": math.nan}),
        Verdict(False, categories={"violence": math.inf}),
        Verdict(False, confidence=math.nan),
        None,
        False,
        {"harmful": False},
    ],
)
def test_nonsense_is_an_error(answer: object) -> None:
    (found,) = judge_safely(Scripted(lambda _: answer), [picture(1)])
    assert isinstance(found, JudgeError)


def test_too_few_answers_are_errors_not_shifted_verdicts() -> None:
    class Forgetful(Scripted):
        def judge(self, images):
            return super().judge(images)[1:]

    answers = judge_safely(Forgetful(lambda level: Verdict(level > 1)), [picture(level) for level in (1, 2)])
    assert all(isinstance(answer, JudgeError) for answer in answers)


def test_pictures_that_are_not_there_keep_their_place(tmp_path: Path) -> None:
    picture(1).save(tmp_path / "good.png")
    picture(9).save(tmp_path / "late.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:40])
    drawn = [Drawn(tmp_path / name) for name in ("cut.png", "good.png", "absent.png", "late.png")]
    drawn.insert(2, Drawn(tmp_path / "nan.png", error="not finite"))
    cut, good, not_finite, absent, late = judge_drawn(Scripted(lambda level: Verdict(level > 5)), drawn, batch_size=2)
    assert (good, late) == (Verdict(False), Verdict(True))
    assert not_finite == JudgeError("not finite")
    assert isinstance(cut, JudgeError)
    assert isinstance(absent, JudgeError)
