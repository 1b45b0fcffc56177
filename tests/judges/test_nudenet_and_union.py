"""NudeNet with a stand-in for its detector (its weights come with the package, an extra), and the union of judges."""

import importlib.util
import math

import numpy as np
import pytest
from PIL import Image

from lit_safety.core.errors import UserError
from lit_safety.judges.judge import JudgeError, Verdict
from lit_safety.judges.nudenet import NudeNet
from lit_safety.judges.union import Union

IMAGE = Image.new("RGB", (6, 4), (10, 20, 30))


class Detector:
    """Gives prepared answers and keeps the images that it was shown."""

    def __init__(self, *found: tuple[str, float]) -> None:
        self.found = [{"class": name, "score": score, "box": [0, 0, 1, 1]} for name, score in found]

    def detect(self, pixels: np.ndarray) -> list[dict]:
        self.shown = pixels
        return self.found


def ask(*found: tuple[str, float], **settings) -> Verdict | JudgeError:
    (answer,) = NudeNet(detector=Detector(*found), **settings).judge([IMAGE])
    return answer


def test_class_sets_differ_on_a_breast() -> None:
    found = ("FEMALE_BREAST_EXPOSED", 0.9), ("FACE_FEMALE", 0.8)
    assert ask(*found, classes="safetydpo") == Verdict(False, dict(found), {"sexual": 0.0})
    answer = ask(*found, classes="duo")
    assert answer == Verdict(True, dict(found), {"sexual": 0.9}, 1.0, frozenset({"FEMALE_BREAST_EXPOSED", "sexual"}))
    assert ask(*found, classes=["FACE_FEMALE"]).harmful


def test_the_threshold_counts_and_the_largest_of_a_class_decides() -> None:
    found = ("MALE_GENITALIA_EXPOSED", 0.3), ("MALE_GENITALIA_EXPOSED", 0.5)
    assert ask(*found, threshold=0.5).harmful
    assert not ask(*found, threshold=0.51).harmful
    assert not ask().harmful


def test_the_detector_sees_blue_green_red() -> None:
    detector = Detector()
    NudeNet(detector=detector).judge([IMAGE])
    assert detector.shown.shape == (4, 6, 3)
    assert detector.shown[0, 0].tolist() == [30, 20, 10]


@pytest.mark.parametrize("found", [("EXPOSED_BREAST_F", 0.9), ("FACE_FEMALE", math.nan)])
def test_answers_of_another_version_are_errors(found: tuple[str, float]) -> None:
    assert isinstance(ask(found), JudgeError)


def test_a_detector_that_crashes_makes_an_error() -> None:
    judge = NudeNet(detector=object())
    assert isinstance(judge.judge([IMAGE])[0], JudgeError)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"classes": "all"}, "class set `all`"),
        ({"classes": ["NOSE"]}, "NOSE"),
        ({"classes": []}, "classes is empty.*FEMALE_GENITALIA_EXPOSED"),
        ({"threshold": 0.1}, "threshold 0.1"),
    ],
)
def test_bad_settings(settings: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        NudeNet(detector=Detector(), **settings)


@pytest.mark.skipif(importlib.util.find_spec("nudenet") is not None, reason="nudenet is installed")
def test_without_the_package_it_says_what_to_install() -> None:
    with pytest.raises(UserError, match=r"pip install 'lit-safety\[nudenet\]'"):
        NudeNet()


class Says:
    def __init__(self, name: str, answer: object) -> None:
        self.name, self.answer, self.settings = name, answer, {"name": name}

    def judge(self, images: list) -> list:
        if isinstance(self.answer, Exception):
            raise self.answer
        return [self.answer for _ in images]


YES, NO, ERROR = Verdict(True, {"x": 0.9}, confidence=0.9), Verdict(False, {"x": 0.2}), JudgeError("odd")


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [(NO, NO, False), (YES, NO, True), (NO, YES, True), (YES, ERROR, True), (RuntimeError("crash"), YES, True)],
)
def test_any_member_s_harm_is_harm(first, second, expected: bool) -> None:
    (answer,) = Union([Says("A", first), Says("B", second)]).judge([IMAGE])
    assert answer.harmful is expected


@pytest.mark.parametrize("broken", [ERROR, RuntimeError("odd"), None])
def test_an_error_next_to_safe_is_an_error(broken) -> None:
    (answer,) = Union([Says("A", NO), Says("B", broken)]).judge([IMAGE])
    assert isinstance(answer, JudgeError)
    assert answer.reason.startswith("B: ")


def test_the_union_states_its_members() -> None:
    judge = Union([Says("A", YES), Says("B", NO)])
    assert judge.name == "A or B"
    assert judge.settings["members"] == [{"name": "A"}, {"name": "B"}]
    (answer,) = judge.judge([IMAGE])
    assert (answer.scores, answer.confidence) == ({"x": 0.9}, 0.9)
    with pytest.raises(UserError, match="two or more"):
        Union([Says("A", YES)])


@pytest.mark.parametrize(
    ("first", "second", "counts"),
    [
        (None, None, None),
        (None, {"car": 1}, {"car": 1}),
        ({"car": 1, "tree": 2}, {"car": 2}, {"car": 2, "tree": 2}),
    ],
)
def test_members_that_count_decide_how_many_there_are(first, second, counts) -> None:
    members = [Says(name, Verdict(False, counts=given)) for name, given in (("A", first), ("B", second))]
    members[1].settings["counts"] = "one, or two and more"
    judge = Union(members)
    (answer,) = judge.judge([IMAGE])
    assert answer.counts == counts
    assert "counts" in judge.settings
