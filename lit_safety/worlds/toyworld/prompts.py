"""Prompt sets: what is asked of a model, in the columns that `evaluate` reads."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lit_safety.core.tables import csv_lines
from lit_safety.judges.toy.objects import CONCEPTS, LOOKALIKES, SETTINGS
from lit_safety.worlds.toyworld.captions import HELD_OUT_TEMPLATES, JOINERS, TEMPLATES, fold, say
from lit_safety.worlds.toyworld.sampling import Contents, draw_contents
from lit_safety.worlds.toyworld.seeds import SEEDS, stream

COLUMNS = ("prompt", "kind", "category", "concept", "benign", "held_out", "seed")
COUNTS: dict[str, dict[str, int]] = {
    "val": {"explicit": 480, "implicit": 216, "lookalike": 196, "clean": 400},
    "test": {"explicit": 2400, "implicit": 720, "lookalike": 504, "clean": 2000},
}
"""Rows of each kind; concepts, phrases, look-alikes and numbers of objects take turns."""


def _layout(kind: str, index: int) -> str:
    if kind == "clean":
        return ("benign", "benign_benign")[index % 2]
    first = "lookalike" if kind == "lookalike" else "harm"
    return first if index % 4 == 0 else f"{first}_benign"


def prompt_rows(part: str) -> Iterator[dict[str, str | int]]:
    """The rows of "val" (alignment's templates) or "test" (held-out templates); both on combinations of their own."""
    owner, number = f"prompts_{part}", 0
    templates = HELD_OUT_TEMPLATES if part == "test" else TEMPLATES
    for kind, count in COUNTS[part].items():
        for i in range(count):
            rng = stream(owner, number)
            harmful = kind in ("explicit", "implicit")
            turn = i if kind in ("explicit", "lookalike") else i // 3
            concept = list(CONCEPTS)[turn % len(CONCEPTS)] if harmful else None
            lookalike = LOOKALIKES[i % len(LOOKALIKES)]
            rounds = {"clean": i, "lookalike": i // len(LOOKALIKES)}.get(kind, i // len(CONCEPTS))
            setting, contents = _find(rng, part, _layout(kind, rounds), concept, lookalike)
            phrase = i % 3 if kind == "implicit" else None
            text = say(setting, contents, str(rng.choice(templates)), str(rng.choice(JOINERS)), phrase)
            yield {
                "prompt": text,
                "kind": kind,
                "category": CONCEPTS[concept].category if concept else "",
                "concept": concept or "",
                "benign": ";".join(name for name, _ in contents if name not in CONCEPTS),
                "held_out": int(phrase == 2),
                "seed": SEEDS[owner][number],
            }
            number += 1


def _find(
    rng: np.random.Generator, part: str, layout: str, concept: str | None, lookalike: str
) -> tuple[str, Contents]:
    """A setting and contents of the wanted fold; the look-alike is the given one."""
    while True:
        contents = draw_contents(rng, layout, concept)
        contents = tuple((lookalike, None) if name in LOOKALIKES else (name, colour) for name, colour in contents)
        setting = str(rng.choice(list(SETTINGS)))
        if fold(setting, contents) == part:
            return setting, contents


def write_prompt_files(folder: Path) -> None:
    """Writes val.csv and test.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in COUNTS:
        unfinished = folder / f"{part}.csv.part"
        with unfinished.open("w", newline="", encoding="utf-8") as file:
            file.write(csv_lines([COLUMNS, *([row[name] for name in COLUMNS] for row in prompt_rows(part))]))
        unfinished.rename(folder / f"{part}.csv")
