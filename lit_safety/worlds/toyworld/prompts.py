"""The toy world's prompt sets, in the columns that `evaluate` reads."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lit_safety.judges.toy.objects import CONCEPTS, LOOKALIKES, SETTINGS
from lit_safety.worlds.held_out import write_parts
from lit_safety.worlds.toyworld.captions import (
    HELD_OUT_SCENE,
    HELD_OUT_TEMPLATES,
    JOINERS,
    TEMPLATES,
    U_TEST,
    U_VAL,
    fold,
    held_out,
    may_align,
    say,
)
from lit_safety.worlds.toyworld.pairs import SEEN_PHRASES
from lit_safety.worlds.toyworld.sampling import Contents, draw_contents
from lit_safety.worlds.toyworld.seeds import SEEDS, stream

COUNTS: dict[str, dict[str, int]] = {
    "val": {"explicit": 480, "implicit": 216, "lookalike": 198, "clean": 400},
    "test": {"explicit": 2400, "implicit": 720, "lookalike": 504, "clean": 2000},
    "anchors": {"lookalike": 72, "clean": 120},
    "online": {"explicit": 480, "implicit": 144, "lookalike": 72, "clean": 120},
}
"""Rows of each kind; concepts, phrases, look-alikes and numbers of objects take turns."""
UNNAMED: dict[str, tuple[str, ...]] = {"val": U_VAL, "test": U_TEST, "anchors": (), "online": ()}
"""The unnamed subjects that the part asks for. It asks for none of the other part's."""
FOLD = {"val": "val", "test": "test", "anchors": "train", "online": "train"}
"""The fold whose combinations of things, colours and settings the part uses."""


def _layout(kind: str, index: int) -> str:
    if kind == "clean":
        return ("benign", "benign_benign")[index % 2]
    first = "lookalike" if kind == "lookalike" else "harm"
    return first if index % 4 == 0 else f"{first}_benign"


def _lookalikes(part: str) -> tuple[str, ...]:
    """Look-alikes in the order of the rows: every third one is unnamed, if the part has unnamed ones."""
    unnamed = [name for name in LOOKALIKES if name in UNNAMED[part]]
    named = [name for name in LOOKALIKES if name not in U_TEST + U_VAL]
    if not unnamed:
        return tuple(named)
    turns = len(named) * len(unnamed)
    return tuple(
        unnamed[i // 3 % len(unnamed)] if i % 3 == 2 else named[(i - i // 3) % len(named)] for i in range(3 * turns)
    )


def prompt_rows(part: str) -> Iterator[dict[str, str | int]]:
    """The rows of "val" (alignment's templates), "test" (held-out templates), "anchors" (harmless things of pairs) or
    "online" (prompts for which a policy draws images to learn from; without held-out phrases).

    "val" and "test" each use their own combinations. Half of the explicit test rows for the category of
    `HELD_OUT_SCENE` are in its setting; no other row is.
    """
    owner, number = f"prompts_{part}", 0
    templates = HELD_OUT_TEMPLATES if part == "test" else TEMPLATES
    lookalikes = _lookalikes(part)
    for kind, count in COUNTS[part].items():
        for i in range(count):
            rng = stream(owner, number)
            harmful = kind in ("explicit", "implicit")
            phrases = len(SEEN_PHRASES) if part == "online" else 3
            turn = i if kind in ("explicit", "lookalike") else i // phrases
            concept = list(CONCEPTS)[turn % len(CONCEPTS)] if harmful else None
            rounds = {"clean": i, "lookalike": i // len(lookalikes)}.get(kind, i // len(CONCEPTS))
            category = CONCEPTS[concept].category if concept else ""
            scene = HELD_OUT_SCENE[0] if kind == "explicit" and part == "test" and rounds // 2 % 2 else None
            scene = scene if category == HELD_OUT_SCENE[1] else None
            layout = _layout(kind, rounds)
            setting, contents = _find(rng, part, layout, concept, lookalikes[i % len(lookalikes)], scene)
            phrase = i % phrases if kind == "implicit" else None
            text = say(setting, contents, str(rng.choice(templates)), str(rng.choice(JOINERS)), phrase)
            benign = [name for name, _ in contents if name not in CONCEPTS]
            yield {
                "prompt": text,
                "kind": kind,
                "category": category,
                "concept": concept or "",
                "benign": ";".join(benign),
                "unnamed": ";".join(name for name in benign if name in U_TEST + U_VAL),
                "held_out": int(phrase == 2 or scene is not None),
                "seed": SEEDS[owner][number],
            }
            number += 1


def _find(
    rng: np.random.Generator, part: str, layout: str, concept: str | None, lookalike: str, scene: str | None
) -> tuple[str, Contents]:
    """A setting and contents of the wanted fold; the look-alike is the given one.

    Args:
        rng: this row's random stream.
        part: "val", "test", "anchors" or "online".
        layout: the layout of the scene.
        concept: the harm.
        lookalike: the look-alike to use in place of any other.
        scene: the setting; None: any setting in which pairs may show the harm.
    """
    unseen = tuple(name for name in U_TEST + U_VAL if name not in UNNAMED[part])

    def allowed(setting: str, contents: Contents) -> bool:
        aligned = may_align(setting, contents, None if scene else concept, unseen)
        return fold(setting, contents) == FOLD[part] and aligned

    if layout == "harm" and not any(allowed(one, ((str(concept), None),)) for one in ([scene] if scene else SETTINGS)):
        layout = "harm_benign"
    while True:
        contents = draw_contents(rng, layout, concept)
        contents = tuple((lookalike, None) if name in LOOKALIKES else (name, colour) for name, colour in contents)
        setting = scene or str(rng.choice(list(SETTINGS)))
        if allowed(setting, contents):
            return setting, contents


def write_prompt_files(folder: Path) -> None:
    """Writes anchors.csv, online.csv, val.csv and test.csv, in this order."""
    write_parts(folder, prompt_rows, held_out(U_VAL), held_out(U_TEST), ("anchors", "online"))
