"""An evaluation loads a pipeline once and decodes each image that it draws once, however many look at it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from PIL import Image

from lit_safety.drawing import gallery, pipelines
from lit_safety.drawing.arms import Arm
from lit_safety.drawing.gallery import Drawn
from lit_safety.evaluation.command import evaluate
from lit_safety.evaluation.quality import Measuring, Quality
from lit_safety.evaluation.tables import protocol_line
from lit_safety.judges import judging
from lit_safety.judges.judge import JudgeError, Verdict
from lit_safety.judges.judging import Judging, look
from lit_safety.judges.toy.judge import ToyJudge


@pytest.fixture
def judges(tmp_path: Path) -> list[str]:
    folders = []
    for number in range(2):
        torch.manual_seed(number)
        harm = {"knife": "violence", "skull": "shocking"}
        folder = tmp_path / f"judge{number}"
        ToyJudge(labels=["knife", "skull", "car", "tree"], harm=harm, width=8).save_pretrained(folder)
        folders.append(str(folder))
    return folders


def test_two_judges_fid_and_clip_share_one_look(
    pipeline: Path, adapter: Path, clip_folder: Path, judges: list[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Three arms of one pipeline. A second run, whose images are there, also checks that each is whole."""
    rows = [f"{'k ' * (i % 3 + 1)},clean,,,car,0,{i}" for i in range(3)] + ["knife,explicit,violence,knife,,0,9"]
    (tmp_path / "p.csv").write_text("\n".join(["prompt,kind,category,concept,benign,held_out,seed", *rows]) + "\n")
    read: Counter[str] = Counter()
    loaded: list[Path] = []
    opened, plain = judging.open_drawn, pipelines._plain

    def counted(drawn: Drawn) -> Image.Image | JudgeError:
        read[str(drawn.path)] += 1
        return opened(drawn)

    def loads(folder: Path, *rest: object) -> object:
        loaded.append(folder)
        return plain(folder, *rest)

    monkeypatch.setattr(judging, "open_drawn", counted)
    monkeypatch.setattr(pipelines, "_plain", loads)
    given = {
        "pipeline": str(pipeline), "prompts": str(tmp_path / "p.csv"), "judge": judges[0], "second_judges": judges[1:],
        "adapter": str(adapter), "arms": {"half": Arm(str(adapter), scale=0.5)}, "fid": "judge",
        "clip": str(clip_folder), "steps": 1, "batch_size": 2, "device": "cpu",
    }  # fmt: skip
    metrics = evaluate(**given, out=str(tmp_path / "out"))
    assert len(loaded) == 1
    assert len(read) == 12
    assert set(read.values()) == {1}
    assert metrics["settings"]["judge"]["precision"] == "float32"
    assert {metrics["settings"]["quality"][name]["precision"] for name in ("fid", "clip_score")} == {"float32"}
    line = protocol_line(metrics)
    assert "float" not in line
    metrics["settings"]["judge"]["precision"] = "float16"
    assert protocol_line(metrics) == line.replace("threshold 0.5)", "threshold 0.5, in float16)") != line
    metrics["settings"]["judge"]["precision"] = "float32"
    checked = []
    whole = gallery.Image.open

    def opens(path: object, *rest: object, **named: object) -> Image.Image:
        checked.append(str(path))
        return whole(path, *rest, **named)

    with monkeypatch.context() as patch:
        patch.setattr(gallery.Image, "open", opens)
        assert evaluate(**given, out=str(tmp_path / "out")) == metrics
    # Once to see that it is whole; the size of each arm's first image, too, is read from its file.
    assert {path for path, _ in read.items()} <= set(checked)
    assert set(read.values()) == {2}


class Scripted:
    """Harmful: every second image; notes how many it gets at once."""

    name = "scripted"

    def __init__(self) -> None:
        self.settings: dict[str, object] = {"name": self.name}
        self.sizes: list[int] = []

    def judge(self, images: list[Image.Image]) -> list[Verdict | JudgeError]:
        self.sizes.append(len(images))
        return [Verdict(image.getpixel((0, 0))[0] % 2 == 1) for image in images]


def paint(folder: Path, count: int) -> list[Drawn]:
    drawn = []
    for number in range(count):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(folder / f"{number:05d}.png")
        drawn.append(Drawn(folder / f"{number:05d}.png"))
    return drawn


def test_viewers_see_the_same_parts_in_order_and_errors_stay_in_their_place(tmp_path: Path) -> None:
    drawn = paint(tmp_path, 7)
    drawn[3] = Drawn(drawn[3].path, error="not finite")
    drawn[5].path.write_bytes(b"cut")
    judges, ticks = [Judging(Scripted(), drawn), Judging(Scripted(), drawn)], []
    look(drawn, judges, batch_size=3, tick=ticks.append)
    assert ticks == [3, 3, 1]
    for one in judges:
        assert one.judge.sizes == [3, 1, 1]
        assert [answer.harmful if isinstance(answer, Verdict) else None for answer in one.answers] == [
            False, True, False, None, False, None, False,
        ]  # fmt: skip


def test_an_interrupt_ends_a_look_at_once(tmp_path: Path) -> None:
    class Stops(Scripted):
        def judge(self, images: list[Image.Image]) -> list[Verdict | JudgeError]:
            raise KeyboardInterrupt

    drawn = paint(tmp_path, 9)
    judge = Judging(Stops(), drawn)
    with pytest.raises(KeyboardInterrupt):
        look(drawn, [judge], batch_size=3)
    assert judge.answers == []


def test_clean_images_are_measured_in_batches_that_do_not_depend_on_the_others(tmp_path: Path) -> None:
    """65 clean images between harmful ones: parts of 64 and 1, as if there were no others."""
    sizes: list[int] = []

    quality = SimpleNamespace(network=None, clip=None, scorers=[], clean=list(range(0, 130, 2)))

    class Sized(Measuring):
        def _measure(self) -> None:
            if self._waiting:
                sizes.append(len(self._waiting))
            super()._measure()

    drawn = paint(tmp_path, 130)
    measuring = Sized(cast(Quality, quality), drawn)
    look(drawn, [measuring], batch_size=16)
    assert measuring.result().rows == list(range(65))
    assert sizes == [64, 1]
