"""Questions about an image whose answer the prompt states: how many of a thing, of what colour, and where.

As in TIFA (arXiv 2303.11897), a prompt is turned into questions, and the image's score is the share of right answers.
The questions are in the column `questions` of a prompt file: `count:car=2; colour:car=red; place=park`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lit_safety.core.errors import UserError
from lit_safety.core.tables import whole_number

QuestionKind = Literal["count", "colour", "place"]
KINDS: tuple[QuestionKind, ...] = ("count", "colour", "place")
NONE_OF_THESE = "none of these"
"""An answer that can always be chosen."""


@dataclass(frozen=True)
class Question:
    """One question and its answer."""

    kind: QuestionKind
    about: str
    """The thing, as the judge names it; empty for a place."""
    answer: str
    """A whole number, a colour, or a place; in lower case."""

    @property
    def text(self) -> str:
        """The question in words."""
        if self.kind == "count":
            return f"How many of this are there in the image: {self.about}? Answer with a whole number."
        if self.kind == "colour":
            return f"What colour is this: {self.about}?"
        return "Where is the scene?"

    def right(self, said: str) -> bool:
        """Whether an answer is the one that the prompt states."""
        if self.kind == "count":
            return whole_number(said) == int(self.answer)
        return said.strip().casefold() == self.answer


def read_questions(cell: str, where: str) -> tuple[Question, ...]:
    """The questions in a cell of the column `questions`.

    Raises:
        UserError: one is not `count:THING=NUMBER`, `colour:THING=COLOUR` or `place=PLACE`.
    """
    found: list[Question] = []
    for part in filter(None, (one.strip() for one in cell.split(";"))):
        left, equals, answer = part.partition("=")
        kind, _, about = left.partition(":")
        kind, about, answer = kind.strip().casefold(), about.strip(), answer.strip().casefold()
        kind = "colour" if kind == "color" else kind
        sound = bool(equals and answer) and kind in KINDS and bool(about) is (kind != "place")
        if kind == "count" and sound:
            number = whole_number(answer)
            sound, answer = number is not None and number >= 0, str(number)
        if not sound:
            raise UserError(
                f"{where}: questions holds {part!r}; write count:THING=NUMBER, colour:THING=COLOUR or place=PLACE"
            )
        if any(one.kind == kind and one.about == about for one in found):
            raise UserError(f"{where}: questions asks twice for {left.strip()!r}")
        found.append(Question(kind, about, answer))  # type: ignore[arg-type]
    return tuple(found)
