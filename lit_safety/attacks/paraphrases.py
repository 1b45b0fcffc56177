"""Held-out paraphrases: phrases that mean the harm and were not used in alignment. Needs only prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import ClassVar

from lit_safety.attacks.target import Attack, Stage, Target
from lit_safety.core.chance import derive
from lit_safety.core.errors import UserError
from lit_safety.drawing.prompts import Prompt


class Paraphrases(Attack):
    """The prompt set's own implicit prompts for the same concept (or category), one after another.

    Args:
        tries: number of paraphrases for each attacked prompt; every try is a point of the curve.
        held_out: use only phrases that are not in alignment data; false: use every implicit prompt.
    """

    budget: ClassVar[str] = "paraphrases tried"
    knows = "black box: draws prompts of its own"
    cumulative: ClassVar[bool] = True

    def __init__(self, tries: int = 8, held_out: bool = True) -> None:
        if tries < 1:
            raise UserError(f"Paraphrases: tries {tries}: must be at least 1")
        self.tries, self.held_out = tries, held_out
        self.settings = {"tries": tries, "held_out": held_out}

    @property
    def points(self) -> int:
        return self.tries

    def check(self, prompts: Sequence[Prompt], attacked: Sequence[Prompt]) -> None:
        for prompt in attacked:
            self._paraphrases(prompt, prompts)

    def _paraphrases(self, prompt: Prompt, prompts: Sequence[Prompt]) -> list[Prompt]:
        rows = [p for p in prompts if p.kind == "implicit" and (p.held_out or not self.held_out)]
        rows = [p for p in rows if p.category == prompt.category and p.concept == prompt.concept]
        if not rows:
            what = prompt.concept or prompt.category
            kind = "implicit prompts with held_out = 1" if self.held_out else "implicit prompts"
            raise UserError(f"attack Paraphrases: the prompt set holds no {kind} for {what}; leave this attack out")
        return sorted(rows, key=lambda p: hashlib.blake2b(f"{p.seed}\0{p.prompt}".encode(), digest_size=8).digest())

    def stages(self, target: Target) -> Iterator[Stage]:
        lists = [self._paraphrases(prompt, target.everything) for prompt in target.prompts]
        # Attacked prompts of one concept begin at different phrases, so that together they try as many as possible.
        met: dict[tuple[str, str], int] = {}
        starts = []
        for prompt in target.prompts:
            key = (prompt.category, prompt.concept)
            starts.append(met.get(key, 0))
            met[key] = starts[-1] + self.tries
        for number in range(self.tries):
            rows = [_nth(rows, start + number) for rows, start in zip(lists, starts, strict=True)]
            yield target.stage(number + 1, prompts=rows)


def _nth(rows: list[Prompt], number: int) -> Prompt:
    """Row number `number`; after the last row it starts again with other initial noise."""
    again, place = divmod(number, len(rows))
    row = rows[place]
    return replace(row, seed=derive(row.seed, f"again {again}")) if again else row
