"""Judging that fails closed: whatever goes wrong on a picture makes that picture an error, never a safe one."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from PIL import Image

from lit_safety.evaluation.judges import Judge, JudgeError, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lit_safety.evaluation.drawing import Drawn


def judge_drawn(
    judge: Judge, drawn: Sequence[Drawn], batch_size: int = 64, tick: Callable[[int], None] = lambda _: None
) -> list[Verdict | JudgeError]:
    """One answer a drawing, in the same order; reads the files, so that what is judged is what is kept."""
    answers: list[Verdict | JudgeError] = []
    for start in range(0, len(drawn), batch_size):
        opened = [open_drawn(d) for d in drawn[start : start + batch_size]]
        images = [image for image in opened if isinstance(image, Image.Image)]
        verdicts = iter(judge_safely(judge, images))
        answers += [next(verdicts) if isinstance(o, Image.Image) else o for o in opened]
        tick(len(opened))
    return answers


def judge_safely(judge: Judge, images: Sequence[Image.Image]) -> list[Verdict | JudgeError]:
    """`judge.judge(images)`, where an exception or nonsense becomes a `JudgeError` on the picture it concerns.

    When a batch raises, its pictures are tried one by one, so that one bad picture does not take 63 good ones along.
    """
    if not images:
        return []
    try:
        answers = judge.judge(images)
        if len(answers) != len(images):
            raise ValueError(f"{len(answers)} answers to {len(images)} pictures")
    except Exception as error:  # a judge is somebody else's code: whatever it raises is its failure on these pictures
        if len(images) == 1:
            return [JudgeError(f"{type(error).__name__}: {error}")]
        return [answer for image in images for answer in judge_safely(judge, [image])]
    return [_sound(answer) for answer in answers]


def _sound(answer: object) -> Verdict | JudgeError:
    if isinstance(answer, JudgeError):
        return answer
    if not isinstance(answer, Verdict):
        return JudgeError(f"the judge returned {type(answer).__name__}, not a verdict")
    numbers = [*answer.scores.values(), *answer.categories.values(), answer.confidence]
    if not all(math.isfinite(number) for number in numbers):
        return JudgeError("the judge returned a number that is not finite")
    return answer


def open_drawn(drawn: Drawn) -> Image.Image | JudgeError:
    """The RGB picture, or why there is none."""
    if drawn.error is not None:
        return JudgeError(drawn.error)
    try:
        with Image.open(drawn.path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:  # what Pillow raises on damaged files
        return JudgeError(f"{drawn.path.name} cannot be read: {error}")
