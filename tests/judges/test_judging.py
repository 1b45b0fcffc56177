import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from lit_safety.attacks.run import rate
from lit_safety.core.errors import UserError
from lit_safety.drawing.gallery import DrawingSettings, Drawn, Gallery, size_of
from lit_safety.judges.judge import JudgeError, Verdict
from lit_safety.judges.judging import judge_drawn, judge_safely


def make_image(level: int) -> Image.Image:
    return Image.new("RGB", (4, 4), (level, 0, 0))


class Scripted:
    """Says what `script` says for the red level of an image."""

    name, settings = "scripted", {}

    def __init__(self, script):
        self.script = script

    def judge(self, images):
        return [self.script(image.getpixel((0, 0))[0]) for image in images]


def test_one_bad_image_does_not_spoil_the_batch() -> None:
    def script(level: int) -> Verdict:
        if level == 2:
            raise RuntimeError("detector crashed")
        return Verdict(harmful=level > 2)

    answers = judge_safely(Scripted(script), [make_image(level) for level in (1, 2, 3)])
    assert answers == [Verdict(False), JudgeError("RuntimeError: detector crashed"), Verdict(True)]


@pytest.mark.parametrize(
    "answer",
    [
        Verdict(False, scores={"gun": math.nan}),
        Verdict(False, categories={"violence": math.inf}),
        Verdict(False, confidence=math.nan),
        Verdict(None),
        Verdict("no"),
        Verdict(0),
        Verdict(math.nan),
        Verdict(False, scores={"gun": "none"}),
        Verdict(False, scores=None),
        None,
        False,
        {"harmful": False},
    ],
)
def test_nonsense_is_an_error(answer: object) -> None:
    (found,) = judge_safely(Scripted(lambda _: answer), [make_image(1)])
    assert isinstance(found, JudgeError)


def test_what_numpy_calls_true_counts_as_harm() -> None:
    """A judge that compares arrays says `np.True_`, which is not `True`: it must not be lost on the way to a rate."""
    verdicts = judge_safely(Scripted(lambda level: Verdict(np.float32(level) > 1)), [make_image(1), make_image(2)])
    assert [verdict.harmful for verdict in verdicts] == [False, True]
    assert all(type(verdict.harmful) is bool for verdict in verdicts)
    assert rate([verdict.harmful for verdict in verdicts])["asr"] == 0.5


@pytest.mark.parametrize("damage", ["cut", "text", "folder"])
def test_a_damaged_image_is_drawn_again_or_an_error_and_never_a_crash(tmp_path: Path, ask, damage: str) -> None:
    """PIL raises another kind for a file cut short, for a text that grows too large, for a folder in its place."""
    gallery = Gallery(tmp_path, "a", {}, [ask("clean", benign="car")], DrawingSettings())
    path = gallery.folder / "00000.png"
    path.parent.mkdir()
    if damage == "folder":
        path.mkdir()
    else:
        about = PngImagePlugin.PngInfo()
        about.add_text("x", "0" * (PngImagePlugin.MAX_TEXT_CHUNK + 1) if damage == "text" else "", zip=True)
        make_image(1).save(path, pnginfo=about)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:50])
    assert gallery.drawn(0) is None
    (answer,) = judge_drawn(Scripted(lambda _: Verdict(False)), [Drawn(path)])
    assert isinstance(answer, JudgeError)
    assert size_of([Drawn(path)]) is None


def test_too_few_answers_are_errors_not_shifted_verdicts() -> None:
    class Forgetful(Scripted):
        def judge(self, images):
            return super().judge(images)[1:]

    answers = judge_safely(Forgetful(lambda level: Verdict(level > 1)), [make_image(level) for level in (1, 2)])
    assert all(isinstance(answer, JudgeError) for answer in answers)


def test_images_that_are_not_there_keep_their_place(tmp_path: Path) -> None:
    make_image(1).save(tmp_path / "good.png")
    make_image(9).save(tmp_path / "late.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:40])
    drawn = [Drawn(tmp_path / name) for name in ("cut.png", "good.png", "absent.png", "late.png")]
    drawn.insert(2, Drawn(tmp_path / "nan.png", error="not finite"))
    cut, good, not_finite, absent, late = judge_drawn(Scripted(lambda level: Verdict(level > 5)), drawn, batch_size=2)
    assert (good, late) == (Verdict(False), Verdict(True))
    assert not_finite == JudgeError("not finite")
    assert isinstance(cut, JudgeError)
    assert isinstance(absent, JudgeError)


def test_a_folder_of_images_that_is_a_file_is_one_line(tmp_path: Path, ask) -> None:
    """What was begun cannot even be looked for there: the message is still that of the write."""
    gallery = Gallery(tmp_path, "a", {}, [ask("clean", benign="car")], DrawingSettings())
    gallery.folder.write_bytes(b"in the way")
    with pytest.raises(UserError, match="cannot be written"):
        gallery._keep(0, np.zeros((4, 4, 3)))
