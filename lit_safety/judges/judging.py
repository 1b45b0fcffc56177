"""Judging that fails closed: if anything goes wrong with an image, it is an error, never a safe image."""

from __future__ import annotations

import hashlib
import json
import math
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from PIL import Image

from lit_safety.core.errors import UserError
from lit_safety.core.files import append_line
from lit_safety.core.hashes import digest
from lit_safety.core.images import decode_image, read_bytes
from lit_safety.core.text import load_json
from lit_safety.judges.judge import Judge, JudgeError, Verdict, verdict_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from lit_safety.drawing.gallery import Drawn


#: What a file holds: an image, or why it cannot be read; None: nobody asked for it.
Opened = Image.Image | JudgeError | None
#: Threads that read and decode images while a device works on others.
READERS = 4


class Viewer(Protocol):
    """Looks at drawings, some at a time, in their order."""

    def wants(self, row: int) -> bool:
        """Whether it needs to see the drawing of this row."""

    def see(self, rows: range, opened: Sequence[Opened]) -> None:
        """Look at the next drawings. Those that it did not want may be None."""


def look(
    drawn: Sequence[Drawn],
    viewers: Sequence[Viewer],
    batch_size: int = 64,
    tick: Callable[[int], None] = lambda _: None,
) -> None:
    """Show drawings to all viewers. Each file is read and decoded once; the next ones are decoded meanwhile.

    Args:
        drawn: the images.
        viewers: who looks at them.
        batch_size: images that a viewer gets at once.
        tick: is called with how many were just seen.
    """
    with ThreadPoolExecutor(READERS) as pool:

        def begin(start: int) -> list[Future[Image.Image | JudgeError] | None]:
            rows = range(start, min(start + batch_size, len(drawn)))
            wanted = [[viewer.wants(row) for viewer in viewers] for row in rows]
            return [
                pool.submit(open_drawn, drawn[row]) if any(w) else None for row, w in zip(rows, wanted, strict=True)
            ]

        try:
            following = begin(0)
            for start in range(0, len(drawn), batch_size):
                now, following = following, begin(start + batch_size)
                opened = [None if one is None else one.result() for one in now]
                for viewer in viewers:
                    viewer.see(range(start, start + len(opened)), opened)
                tick(len(opened))
        except BaseException:  # such as Ctrl-C: nothing else is decoded
            pool.shutdown(cancel_futures=True)
            raise


class Judging:
    """A judge that looks at drawings. `answers` holds one answer a drawing seen so far, in their order.

    Args:
        judge: the judge.
        drawn: the images.
        kept: its earlier verdicts, which are used again, and to which the new ones are added.
    """

    def __init__(self, judge: Judge, drawn: Sequence[Drawn], kept: KeptVerdicts | None = None) -> None:
        self.judge = judge
        self.drawn = drawn
        self.kept = kept
        self.answers: list[Verdict | JudgeError] = []
        self._known: dict[int, Verdict] = {}

    def wants(self, row: int) -> bool:
        """Whether it has no verdict on this drawing yet."""
        if self.kept is not None and (known := self.kept.of(self.drawn[row])) is not None:
            self._known[row] = known
        return row not in self._known

    def see(self, rows: range, opened: Sequence[Opened]) -> None:
        """Judge the next drawings."""
        known = [self._known.pop(row, None) for row in rows]
        to_say = [given or one for given, one in zip(known, opened, strict=True)]
        images = [one for one in to_say if isinstance(one, Image.Image)]
        verdicts = iter(judge_safely(self.judge, images))
        said = [next(verdicts) if isinstance(one, Image.Image) else one for one in to_say]
        answers = [one for one in said if one is not None]
        if self.kept is not None:
            part = [self.drawn[row] for row in rows]
            self.kept.add([(one, v) for one, v, old in zip(part, answers, known, strict=True) if old is None])
        self.answers += answers


def judge_drawn(
    judge: Judge,
    drawn: Sequence[Drawn],
    batch_size: int = 64,
    tick: Callable[[int], None] = lambda _: None,
    kept: KeptVerdicts | None = None,
) -> list[Verdict | JudgeError]:
    """One answer a drawing, in the same order. It reads the files, so that the saved images are judged.

    Args:
        judge: the judge.
        drawn: the images.
        batch_size: images that it gets at once.
        tick: is called with how many were just judged.
        kept: its earlier verdicts, which are used again, and to which the new ones are added.
    """
    judging = Judging(judge, drawn, kept)
    look(drawn, [judging], batch_size, tick)
    return judging.answers


def judge_safely(judge: Judge, images: Sequence[Image.Image]) -> list[Verdict | JudgeError]:
    """`judge.judge(images)`, in which an exception or an invalid answer becomes a `JudgeError` for its image.

    If a batch raises, its images are tried one by one, so that one bad image does not spoil 63 good ones.
    """
    if not images:
        return []
    try:
        answers = judge.judge(images)
        if len(answers) != len(images):
            raise ValueError(f"{len(answers)} answers to {len(images)} images")
    except Exception as error:  # a judge is other people's code: every exception is its failure on these images
        if len(images) == 1:
            return [JudgeError(f"{type(error).__name__}: {error}")]
        return [answer for image in images for answer in judge_safely(judge, [image])]
    return [sound(answer) for answer in answers]


def sound(answer: object) -> Verdict | JudgeError:
    """A verdict with true or false and finite numbers; anything else is an error.

    NumPy's true and false become Python's, because `is True` fails for NumPy's.
    """
    if isinstance(answer, JudgeError):
        return answer
    if not isinstance(answer, Verdict):
        return JudgeError(f"the judge returned {type(answer).__name__}, not a verdict")
    if not isinstance(answer.harmful, bool | np.bool_):
        return JudgeError(f"the judge's `harmful` must be true or false, not {str(answer.harmful)[:40]}")
    try:
        numbers = [*answer.scores.values(), *answer.categories.values(), answer.confidence]
        finite = all(math.isfinite(number) for number in numbers)
        if answer.counts is not None and not all(count in (1, 2) for count in answer.counts.values()):
            return JudgeError("the judge returned a count that is neither 1 nor 2")
    except (TypeError, AttributeError):
        return JudgeError("the judge returned scores that are not numbers")
    if not finite:
        return JudgeError("the judge returned a number that is not finite")
    return answer if isinstance(answer.harmful, bool) else replace(answer, harmful=bool(answer.harmful))


def open_drawn(drawn: Drawn) -> Image.Image | JudgeError:
    """The RGB image, or why it cannot be read."""
    if drawn.error is not None:
        return JudgeError(drawn.error)
    try:
        return decode_image(read_bytes(drawn.path), drawn.path.name)
    except UserError as error:
        return JudgeError(f"{drawn.path.name} cannot be read: {error}")


# Verdicts of a judge whose answers cost money or time: each is stored in a journal next to the images at once.
#
# If a run is killed, or its endpoint fails, the next run does not ask again about judged images. Errors are not stored,
# so those images are judged again.


class KeptVerdicts:
    """The journal of one judge with its settings in one folder of images. A verdict belongs to an image's bytes.

    Args:
        folder: where the images are.
        judge: the judge; other settings (threshold, template, model) have another journal.
    """

    def __init__(self, folder: Path, judge: Judge) -> None:
        self.file = folder / f"verdicts-{digest(verdict_settings(judge.settings))[:12]}.jsonl"
        self._verdicts: dict[str, Verdict] = {}
        self._keys: dict[Path, str | None] = {}
        self._torn = False
        if self.file.is_file():
            text = self.file.read_text(encoding="utf-8", errors="replace")
            self._torn = not text.endswith("\n")
            for line in text.splitlines():
                self._read(line)

    def of(self, drawn: Drawn) -> Verdict | None:
        """The verdict on an image; None: it must be judged."""
        key = self._key(drawn)
        return None if key is None else self._verdicts.get(key)

    def add(self, judged: Sequence[tuple[Drawn, Verdict | JudgeError]]) -> None:
        """Note new verdicts.

        Raises:
            UserError: the disk is full; earlier verdicts stay.
        """
        lines = []
        for drawn, verdict in judged:
            key = self._key(drawn)
            if key is not None and isinstance(verdict, Verdict):
                about = {"scores": verdict.scores, "categories": verdict.categories, "confidence": verdict.confidence}
                about |= {"harmful": verdict.harmful, "present": sorted(verdict.present)}
                about |= {} if verdict.counts is None else {"counts": dict(verdict.counts)}
                lines.append(json.dumps({"sha256": key, "file": drawn.path.name, **about}))
        if lines:
            append_line(self.file, "\n".join(["", *lines] if self._torn else lines))
            self._torn = False

    def _read(self, line: str) -> None:
        try:
            said: dict[str, Any] = load_json(line)
            numbers = (said["scores"], said["categories"], said["confidence"])
            verdict = sound(Verdict(said["harmful"], *numbers, frozenset(said["present"]), said.get("counts")))
            if isinstance(verdict, Verdict):
                self._verdicts[said["sha256"]] = verdict
        except (ValueError, KeyError, TypeError):  # a kill or a full disk cut the line short
            return

    def _key(self, drawn: Drawn) -> str | None:
        if drawn.path not in self._keys:
            there = drawn.error is None and drawn.path.is_file()
            self._keys[drawn.path] = hashlib.sha256(drawn.path.read_bytes()).hexdigest() if there else None
        return self._keys[drawn.path]
