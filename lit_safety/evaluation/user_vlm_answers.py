"""Pass and Win Rate by a vision-language model: what was answered once is kept and never asked again.

An answer is kept under a hash of model, question and pictures. Failures are not kept: the same command asks again.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any, get_args

from lit_safety.bounded import load_json
from lit_safety.data.atomic import append_line, write_atomic
from lit_safety.evaluation.fingerprint import digest
from lit_safety.evaluation.judges import JudgeError
from lit_safety.evaluation.judging import open_drawn
from lit_safety.evaluation.user_wins import KINDS, Choice, ours_first, outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from PIL.Image import Image

    from lit_safety.evaluation.drawing import Drawn
    from lit_safety.evaluation.user_rows import UserRow
    from lit_safety.evaluation.user_vlm import UserVLM
    from lit_safety.evaluation.user_wins import Outcome

AT_ONCE = 32
"""Questions between two looks at the progress bar."""


class AnswerBook:
    """Answers by key in an append-only JSONL file. Lines that a kill or a full disk cut short are taken out.

    Args:
        path: the file; made with the first answer.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answers: dict[str, bool | str] = {}
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        whole = b""
        for line in lines:
            try:
                noted = load_json(line)
                key, answer = noted["key"], noted["answer"]
            except (ValueError, KeyError, TypeError):
                continue
            plain = isinstance(key, str) and (isinstance(answer, bool) or answer in get_args(Choice))
            if plain and line.endswith(b"\n"):  # without an end the next answer would be written behind it
                self.answers[key] = answer
                whole += line
        if whole != b"".join(lines):
            write_atomic(path, whole)

    def add(self, key: str, answer: bool | str) -> None:
        """Note an answer.

        Raises:
            UserError: it cannot be written.
        """
        self.answers[key] = answer
        self.path.parent.mkdir(parents=True, exist_ok=True)
        append_line(self.path, json.dumps({"key": key, "answer": answer}))


def ask_passes(
    judge: UserVLM, book: AnswerBook, rows: Sequence[UserRow], drawn: Sequence[Drawn], tick: Callable[[int], None]
) -> list[bool | JudgeError]:
    """Whether each row's picture respects its user; an error where it cannot be said."""
    return _ask(judge, book, rows, [[one] for one in drawn], lambda rows, one: judge.passes(rows, one[0]), tick)


def ask_wins(
    judge: UserVLM,
    book: AnswerBook,
    rows: Sequence[UserRow],
    ours: Sequence[Drawn],
    theirs: Sequence[Drawn],
    seed: int,
    tick: Callable[[int], None],
) -> list[Outcome | JudgeError | None]:
    """How our picture does against the other one of each row; None for rows that are not compared."""
    compared = [number for number, row in enumerate(rows) if row.part in KINDS]
    first = [ours_first(rows[number], seed) for number in compared]
    pairs = [
        [ours[number], theirs[number]] if mine else [theirs[number], ours[number]]
        for number, mine in zip(compared, first, strict=True)
    ]
    choices = _ask(
        judge, book, [rows[number] for number in compared], pairs, lambda rows, two: judge.prefers(rows, *two), tick
    )
    found: list[Outcome | JudgeError | None] = [None] * len(rows)
    for number, choice, mine in zip(compared, choices, first, strict=True):
        found[number] = outcome(choice, mine)
    return found


def _ask(
    judge: UserVLM,
    book: AnswerBook,
    rows: Sequence[UserRow],
    drawn: Sequence[Sequence[Drawn]],
    ask: Callable[[list[UserRow], list[list[Image]]], list[Any]],
    tick: Callable[[int], None],
) -> list[Any]:
    """Answers in the rows' order, each from the book where it stands there. `drawn`: a row's picture, or its two."""
    answers: list[Any] = [None] * len(rows)
    for start in range(0, len(rows), AT_ONCE):
        part = range(start, min(start + AT_ONCE, len(rows)))
        waiting: dict[int, tuple[str, list[Image]]] = {}
        for number in part:
            pictures = [open_drawn(one) for one in drawn[number]]
            failed = next((one for one in pictures if isinstance(one, JudgeError)), None)
            if failed is not None:
                answers[number] = failed
                continue
            opened: Any = pictures
            key = _key(judge, rows[number], opened)
            if key in book.answers:
                answers[number] = book.answers[key]
            else:
                waiting[number] = (key, opened)
        columns = [list(column) for column in zip(*(pictures for _, pictures in waiting.values()), strict=True)]
        said = ask([rows[number] for number in waiting], columns) if waiting else []
        for (number, (key, _)), answer in zip(waiting.items(), said, strict=True):
            answers[number] = answer
            if not isinstance(answer, JudgeError):
                book.add(key, answer)
        tick(len(part))
    return answers


def _key(judge: UserVLM, row: UserRow, pictures: Sequence[Image]) -> str:
    shown = [hashlib.sha256(one.tobytes()).hexdigest() for one in pictures]
    return digest([judge.identity(), judge.question(row, len(pictures)), [one.size for one in pictures], shown])
