"""Prompt sets of the art world, in the columns that `evaluate` reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lit_safety.judges.art.subjects import HARMS, HELD_OUT_STYLE, NAMED, SETTINGS, SUBJECTS, U_TEST, U_VAL
from lit_safety.worlds.artworld.pairs import LOOKALIKES, SEEN_STYLES, fold
from lit_safety.worlds.artworld.sampling import HELD_OUT_TEMPLATES, JOINERS, TEMPLATES, Contents, say
from lit_safety.worlds.artworld.scene import Scene
from lit_safety.worlds.artworld.seeds import SEEDS, stream
from lit_safety.worlds.held_out import HeldOut, write_parts

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SEEN_SYNONYMS, HELD_OUT_SYNONYM = (0, 1), 2
STYLED = 0.8
"""Share of prompts that name the style; prompts of the held-out style always name it."""


def held_out(subjects: tuple[str, ...]) -> HeldOut:
    """These subjects with their synonyms, which files for alignment or selection must not name."""
    return HeldOut({name: SUBJECTS[name].synonyms for name in subjects})


class _Rows:
    """Makes the rows of one part, each with its own seed."""

    def __init__(self, part: str) -> None:
        self.part, self.owner, self.number = part, f"prompts_{part}", 0
        self.templates = HELD_OUT_TEMPLATES if part == "test" else TEMPLATES
        self.unnamed = {"test": U_TEST, "val": U_VAL, "anchors": ()}[part]
        self.fold = "train" if part == "anchors" else part

    def row(
        self,
        kind: str,
        first: str,
        other: tuple[str, ...] = (),
        style: str | None = None,
        synonym: int | None = None,
        held: bool = False,
    ) -> dict[str, str | int]:
        """A prompt for `first`, together with one of `other` if any are given."""
        rng, number = stream(self.owner, self.number), self.number
        self.number += 1
        setting, contents = self._find(rng, first, other)
        said = bool(style) or rng.random() < STYLED
        scene = Scene(setting, style or str(rng.choice(SEEN_STYLES)), ())
        synonyms = tuple(synonym if name == first else None for name in contents)
        harm = first if SUBJECTS[first].category else ""
        benign = [name for name in contents if not SUBJECTS[name].category]
        prompt = say(scene, contents, str(rng.choice(self.templates)), str(rng.choice(JOINERS)), synonyms, said)
        questions = [f"count:{name}=1" for name in benign]
        if synonym is None and setting in prompt.replace(",", " ").split():
            questions.append(f"place={setting}")
        return {
            "prompt": prompt,
            "kind": kind,
            "category": SUBJECTS[harm].category or "" if harm else "",
            "concept": harm,
            "benign": ";".join(benign),
            "unnamed": ";".join(name for name in benign if name in self.unnamed),
            "held_out": int(held),
            "seed": SEEDS[self.owner][number],
            "questions": "; ".join(questions),
        }

    def _find(self, rng: np.random.Generator, first: str, other: tuple[str, ...]) -> tuple[str, Contents]:
        while True:
            names = [first]
            if other:
                names.append(str(rng.choice([name for name in other if name != first])))
                if rng.random() < 0.5:
                    names.reverse()
            setting = str(rng.choice(list(SETTINGS)))
            if fold(tuple(names), setting) == self.fold:
                return setting, tuple(names)

    def rows(self) -> Iterator[dict[str, str | int]]:
        """All rows: explicit, implicit, look-alike, clean; for "anchors" only harmless subjects that pairs name."""
        if self.part == "anchors":
            for turn in range(2):
                for name in NAMED:
                    yield self.row("lookalike" if name in LOOKALIKES else "clean", name, NAMED if turn else ())
            return
        test = self.part == "test"
        for turn in range(6 if test else 2):
            for harm in HARMS:
                yield self.row("explicit", harm, NAMED if turn % 2 else ())
        for turn in range(3 if test else 0):
            for harm in HARMS:
                yield self.row("explicit", harm, NAMED if turn % 3 == 2 else (), HELD_OUT_STYLE, held=True)
        for synonym in (*SEEN_SYNONYMS, *((HELD_OUT_SYNONYM,) * 2 if test else ())):
            for harm in HARMS:
                yield self.row("implicit", harm, synonym=synonym, held=synonym == HELD_OUT_SYNONYM)
        for turn in range(2 if test else 1):
            for name in sorted(LOOKALIKES):
                yield self.row("lookalike", name, NAMED if turn % 2 else ())
        for turn in range(4 if test else 1):
            for name in NAMED:
                if name not in LOOKALIKES:
                    yield self.row("clean", name, NAMED if turn % 2 else ())
        for turn in range(9 if test else 4):
            for name in self.unnamed:
                yield self.row("clean", name, (NAMED if turn % 3 == 1 else self.unnamed) if turn % 3 else ())


def prompt_rows(part: str) -> Iterator[dict[str, str | int]]:
    """The rows of "val" (alignment's templates, seen styles), "test" (held-out templates) or "anchors"."""
    return _Rows(part).rows()


def write_prompt_files(folder: Path) -> None:
    """Writes anchors.csv, val.csv and test.csv, in this order."""
    write_parts(folder, prompt_rows, held_out(U_VAL), held_out(U_TEST))
