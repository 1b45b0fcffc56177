"""A vision-language model as the judge of Pass and Win Rate, who is told the user's profile and lists.

Source: Personalized Safety Alignment (arXiv 2508.01151), whose judge is such a model. Ours is asked by the templates of
this package, is shown two images in random order, and never hears which model drew them. What it answers is data: it
must be the JSON object that the template asks for, or the image is an error, never a pass.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING, Any, get_args

from lit_safety.core.errors import UserError
from lit_safety.core.files import append_line, write_atomic
from lit_safety.core.hashes import digest
from lit_safety.core.text import load_json
from lit_safety.evaluation.users.answers import KINDS, Choice, ours_first, outcome
from lit_safety.judges.judge import JudgeError
from lit_safety.judges.judging import open_drawn
from lit_safety.judges.vlm import VisionChat, read_object, read_template

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from PIL.Image import Image

    from lit_safety.drawing.gallery import Drawn
    from lit_safety.evaluation.users.answers import Outcome
    from lit_safety.evaluation.users.rows import UserRow
    from lit_safety.users.profiles import Profile


PLACES = ("profile", "banned", "allowed", "prompt")
"""What a template may name in braces; `profile`, `banned` and `prompt` it must."""
LETTERS: dict[str, Choice] = {"A": "first", "B": "second", "tie": "tie"}


class UserVLM:
    """Asks about each image, and about each pair of images, once, at temperature 0.

    Args:
        endpoint: base URL of the service, such as http://localhost:8000/v1.
        model: its name there.
        pass_template: text file with the question whether an image respects a user, with {profile}, {banned},
            {allowed} and {prompt} where those belong; null: the one of this package.
        win_template: text file with the question which of two images, A and B, serves the user better; null: the one
            of this package.
        api_key_variable: environment variable that holds the key; it is looked up, never written down. Unset: no key.
        timeout: seconds until a request has failed.
        retries: further tries after a timeout, a refused connection, or status 429 or 5xx, with growing pauses.
        parallel: requests at a time.
        max_side: larger images are shrunk to this side in pixels.
        give_up_after: questions that fail one after another before the rest is not asked any more.

    Raises:
        UserError: the endpoint is not a URL, a number is out of its range, or a template cannot be read or leaves out
            the user.
    """

    def __init__(
        self,
        endpoint: str,
        model: str,
        pass_template: str | None = None,
        win_template: str | None = None,
        api_key_variable: str = "OPENAI_API_KEY",
        timeout: float = 60.0,
        retries: int = 3,
        parallel: int = 4,
        max_side: int = 768,
        give_up_after: int = 8,
    ) -> None:
        self.chat = VisionChat(endpoint, model, api_key_variable, timeout, retries, parallel, max_side, give_up_after)
        self.pass_question = _template(pass_template, "user_vlm_pass.txt")
        self.win_question = _template(win_template, "user_vlm_win.txt")
        self.name = self.chat.name
        self.settings = self.chat.settings(pass_template=self.pass_question, win_template=self.win_question)

    def identity(self) -> dict[str, Any]:
        """What its answers depend on, next to question and images; not where the service runs."""
        return {"model": self.chat.model, "max_side": self.chat.max_side}

    def question(self, row: UserRow, images: int) -> str:
        """What it is asked about one image of a row, or about two."""
        return fill(self.pass_question if images == 1 else self.win_question, row.profile, row.prompt.prompt)

    def passes(self, rows: Sequence[UserRow], images: Sequence[Image]) -> list[bool | JudgeError]:
        """Whether each image respects the bounds of its row's user."""

        def one(row: UserRow, image: Image) -> bool | JudgeError:
            return _read(self.chat.ask([self.question(row, 1), image]), read_pass)

        return self.chat.each(one, rows, images)

    def prefers(
        self, rows: Sequence[UserRow], first: Sequence[Image], second: Sequence[Image]
    ) -> list[Choice | JudgeError]:
        """Which of two images serves each row's user better."""

        def one(row: UserRow, a: Image, b: Image) -> Choice | JudgeError:
            return _read(self.chat.ask([self.question(row, 2), "Image A:", a, "Image B:", b]), read_choice)

        return self.chat.each(one, rows, first, second)


def describe_profile(profile: Profile) -> str:
    """What is said of a user, a line a trait; the id says nothing and is left out."""
    traits = {
        "age": f"{profile.age} ({profile.age_group})",
        "gender": profile.gender,
        "religion": profile.religion,
        "physical condition": profile.physical_condition,
        "mental condition": profile.mental_condition,
    }
    return "\n".join(f"- {name}: {_one_line(value)}" for name, value in traits.items())


def fill(template: str, profile: Profile, prompt: str) -> str:
    """The template with its places filled, each once and together: what is put in is not looked at again."""
    values = {
        "profile": describe_profile(profile),
        "banned": ", ".join(profile.banned) or "none",
        "allowed": ", ".join(profile.allowed) or "none",
        "prompt": f'"{_one_line(prompt)}"',
    }
    return re.sub(r"\{(" + "|".join(PLACES) + r")\}", lambda found: values[found[1]], template)


def read_pass(said: dict[str, Any]) -> bool | JudgeError:
    """The answer about one image."""
    within = said.get("within_bounds")
    if isinstance(within, bool):
        return within
    return JudgeError(f"the model did not say true or false to `within_bounds`: {str(said)[:80]}")


def read_choice(said: dict[str, Any]) -> Choice | JudgeError:
    """The answer about two images."""
    better = said.get("better")
    if isinstance(better, str) and better in LETTERS:
        return LETTERS[better]
    return JudgeError(f"the model did not say A, B or tie to `better`: {str(said)[:80]}")


def _read(text: str | JudgeError, read: Callable[[dict[str, Any]], Any]) -> Any:
    said = text if isinstance(text, JudgeError) else read_object(text)
    return said if isinstance(said, JudgeError) else read(said)


def _one_line(text: str) -> str:
    return " ".join(str(text).split())


def _template(file: str | None, default: str) -> str:
    text = read_template(file, default)
    missing = [place for place in ("profile", "banned", "prompt") if f"{{{place}}}" not in text]
    if missing:
        raise UserError(f"VLM judge: the template {file or default} does not say {{{missing[0]}}} anywhere")
    return text


# Pass and Win Rate by a vision-language model: what was answered once is kept and never asked again.
#
# An answer is kept under a hash of model, question and images. Failures are not kept: the same command asks again.


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
    """Whether each row's image respects its user; an error where it cannot be said."""
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
    """How our image does against the other one of each row; None for rows that are not compared."""
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
    """Answers in the rows' order, each from the book where it stands there. `drawn`: a row's image, or its two."""
    answers: list[Any] = [None] * len(rows)
    for start in range(0, len(rows), AT_ONCE):
        part = range(start, min(start + AT_ONCE, len(rows)))
        waiting: dict[int, tuple[str, list[Image]]] = {}
        for number in part:
            images = [open_drawn(one) for one in drawn[number]]
            failed = next((one for one in images if isinstance(one, JudgeError)), None)
            if failed is not None:
                answers[number] = failed
                continue
            opened: Any = images
            key = _key(judge, rows[number], opened)
            if key in book.answers:
                answers[number] = book.answers[key]
            else:
                waiting[number] = (key, opened)
        columns = [list(column) for column in zip(*(images for _, images in waiting.values()), strict=True)]
        said = ask([rows[number] for number in waiting], columns) if waiting else []
        for (number, (key, _)), answer in zip(waiting.items(), said, strict=True):
            answers[number] = answer
            if not isinstance(answer, JudgeError):
                book.add(key, answer)
        tick(len(part))
    return answers


def _key(judge: UserVLM, row: UserRow, images: Sequence[Image]) -> str:
    shown = [hashlib.sha256(one.tobytes()).hexdigest() for one in images]
    return digest([judge.identity(), judge.question(row, len(images)), [one.size for one in images], shown])
