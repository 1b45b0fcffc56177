"""Preference pairs with known ground truth: which image is harmful, how severely, and how well it is drawn."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lit_safety.core.files import atomic_folder
from lit_safety.data.format.writer import ShardWriter
from lit_safety.judges.toy.objects import CONCEPTS, LOOKALIKES, SETTINGS
from lit_safety.worlds.building import KINDS, LOOKALIKE_COST, SAFE_COST, Pair
from lit_safety.worlds.held_out import check_held_out
from lit_safety.worlds.toyworld.captions import (
    HELD_OUT_SCENE,
    TEMPLATES,
    U_TEST,
    U_VAL,
    counterpart,
    draw_caption,
    fold,
    held_out,
    may_align,
)
from lit_safety.worlds.toyworld.sampling import Contents, arrange, draw_contents, draw_setting, flawed, grade, quality
from lit_safety.worlds.toyworld.scene import SLOTS, Scene, render
from lit_safety.worlds.toyworld.seeds import SEEDS, stream

SEEN_PHRASES = (0, 1)
"""The numbers of each concept's phrases that alignment pairs may use; the last phrase is held out."""
IMPLICIT = 0.3
"""Share of harmful prompts that use a phrase instead of the harm's name."""


def cost(scene: Scene) -> float:
    """Signed ground-truth cost: a harm's severity in (0, 1.25], or a number below 0 without harm."""
    if scene.harm is not None:
        return round(scene.severity, 3)
    return LOOKALIKE_COST if any(thing.name in LOOKALIKES for thing in scene.things) else SAFE_COST


@dataclass(frozen=True)
class Part:
    """What a set's pairs may show."""

    fold: str
    aligned: bool
    """Whether it is used for alignment; then `U_TEST`, `U_VAL` and `HELD_OUT_SCENE` are left out."""

    def allows(self, setting: str, contents: Contents, concept: str | None) -> bool:
        return fold(setting, contents) == self.fold and (not self.aligned or may_align(setting, contents, concept))

    def lookalike(self, concept: str) -> str:
        return counterpart(concept) if self.aligned else CONCEPTS[concept].lookalike

    def alone(self, name: str, concept: str) -> bool:
        """Whether a thing without colour may stand alone in some setting, in a pair about a harm."""
        return any(self.allows(setting, ((name, None),), concept) for setting in SETTINGS)


def _find(
    rng: np.random.Generator, part: Part, layout: str, concept: str | None, setting_of: str | None
) -> tuple[str, Contents]:
    """A setting and contents that the part allows; `setting_of`: the harm in one of the images."""
    while True:
        contents, setting = draw_contents(rng, layout, concept), draw_setting(rng, setting_of)
        if part.allows(setting, contents, setting_of):
            return setting, contents


def _harmful(rng: np.random.Generator, part: Part, concept: str) -> tuple[Scene, Scene, Contents]:
    layout = "harm" if rng.random() < 0.25 and part.alone(concept, concept) else "harm_benign"
    setting, contents = _find(rng, part, layout, concept, concept)
    bad = grade(rng, arrange(rng, setting, contents))
    return replace(bad, harm=None), bad, contents


def _clean_harm(
    rng: np.random.Generator, part: Part, concept: str, drawn: float | None = None
) -> tuple[Scene, Scene, Contents]:
    """Rejected: the harm is added to a single asked thing, or replaces one of two things or its own look-alike.

    `drawn` in [0, 1) chooses among these; none: at random.
    """
    drawn = rng.random() if drawn is None else drawn
    if drawn < 0.45:
        setting, contents = _find(rng, part, "benign", None, concept)
        good = arrange(rng, setting, contents)
        slot = 1 - good.things[0].slot
        other = arrange(rng, setting, ((concept, None), (concept, None))[: slot + 1]).harm
        assert other is not None
        bad = replace(good, harm=replace(other, slot=slot, x=SLOTS[slot] + int(rng.integers(-2, 3))))
        return good, grade(rng, bad), contents
    layout = "benign_benign" if drawn < 0.75 else ("lookalike" if drawn < 0.85 else "lookalike_benign")
    if layout == "lookalike" and not part.alone(part.lookalike(concept), concept):
        layout = "lookalike_benign"
    while True:
        setting, contents = _find(rng, part, layout, None, concept)
        names = [name for name, _ in contents]
        if layout == "benign_benign" or part.lookalike(concept) in names:
            break
    good = arrange(rng, setting, contents)
    gone = good.things[int(rng.integers(len(good.things)))]
    gone = next((thing for thing in good.things if thing.name == part.lookalike(concept)), gone)
    harm = replace(gone, name=concept, colour=None)
    bad = replace(good, things=tuple(t for t in good.things if t is not gone), harm=harm)
    return good, grade(rng, bad), contents


def _clean_quality(rng: np.random.Generator, part: Part) -> tuple[Scene, Scene, Contents]:
    layout = str(rng.choice(["benign", "benign_benign", "lookalike_benign"], p=[0.35, 0.4, 0.25]))
    setting, contents = _find(rng, part, layout, None, None)
    good = arrange(rng, setting, contents)
    return good, flawed(rng, good), contents


def _conflict(rng: np.random.Generator, part: Part, concept: str) -> tuple[Scene, Scene, Contents]:
    """The harmful image is the better drawn one, and quality decides the order."""
    setting, contents = _find(rng, part, "harm_benign", concept, concept)
    bad = arrange(rng, setting, contents)
    return bad, flawed(rng, replace(bad, harm=None)), contents


def make_pair(name: str, index: int, kind: str | None = None, owner: str | None = None) -> Pair:
    """Pair number `index` of a part ("train", "val", "test"); kinds, and concepts within a kind, take turns.

    Pairs of "train" and "val" show nothing that is held out of alignment (`may_align`). Pairs of "test", which only
    measure, and pairs of other owners than alignment's can show it.

    Args:
        kind: one of `KINDS`, "lookalike" (a clean one whose rejected image holds a harm in its look-alike's place), or
            "conflict" (a harmful prompt whose better drawn image is the harmful one).
        owner: owner of its seeds; none: the part itself.
    """
    part = Part(name, aligned=owner is None and name != "test")
    prefix, owner = owner or name, owner or f"pairs_{name}"
    number = index if kind is None else index + 1_000_000
    rng = stream(owner, number)
    turn = index
    if kind is None:
        rounds, place_in_round = divmod(index, len(KINDS))
        kind = KINDS[place_in_round]
        turn = rounds * KINDS.count(kind) + KINDS[:place_in_round].count(kind)
    concept = list(CONCEPTS)[turn % len(CONCEPTS)]
    if kind == "harmful":
        chosen, rejected, contents = _harmful(rng, part, concept)
    elif kind == "clean_harm":
        chosen, rejected, contents = _clean_harm(rng, part, concept)
    elif kind == "lookalike":
        chosen, rejected, contents = _clean_harm(rng, part, concept, rng.uniform(0.75, 1.0))
    elif kind == "clean_quality":
        chosen, rejected, contents = _clean_quality(rng, part)
    else:
        chosen, rejected, contents = _conflict(rng, part, concept)
    asked_harm = kind in ("harmful", "conflict")
    prompt = draw_caption(
        rng, chosen.setting, contents, TEMPLATES, SEEN_PHRASES, implicit=IMPLICIT if asked_harm else 0.0
    )
    metadata: dict[str, Any] = {
        "prompt": prompt,
        "prompt_kind": "harmful" if asked_harm else "clean",
        "categories": [] if kind == "clean_quality" else [CONCEPTS[concept].category],
        "harmful": {"chosen": chosen.harm is not None, "rejected": rejected.harm is not None},
        "order": "quality" if kind in ("clean_quality", "conflict") else "safety",
        "cost": {"chosen": cost(chosen), "rejected": cost(rejected)},
        "score": {"chosen": quality(contents, chosen), "rejected": quality(contents, rejected)},
        "source": f"toyworld/{kind}",
        "seed": SEEDS[owner][number],
    }
    if asked_harm:
        metadata["concept"] = concept
    return Pair(f"{prefix}{number:07d}", metadata, render(chosen), render(rejected))


def pairs(part: str, count: int, kind: str | None = None) -> Iterator[Pair]:
    """The first `count` pairs of a part."""
    return (make_pair(part, i, kind) for i in range(count))


# The toy world's preference pairs as shards.


SETS: dict[str, tuple[str, int, str | None]] = {
    "train": ("train", 2016, None),
    "val": ("val", 192, None),
    "test": ("test", 384, None),
    "conflict": ("train", 96, "conflict"),
}
"""Folder -> part, number of pairs, kind (None: all kinds but "conflict")."""


HELD_OUT = "templates and combinations of the test prompts, the third phrase of each concept"


def held_out_words() -> str:
    """What is held out of alignment's pairs, in words for a manifest."""
    setting, category = HELD_OUT_SCENE
    return f"{', '.join((*U_TEST, *U_VAL))}; the category {category} in the setting {setting}"


def write_shards(folder: Path) -> None:
    """Writes every set of `SETS` into a folder of its name; each folder is replaced at once."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (part, count, kind) in SETS.items():
        with atomic_folder(folder / name) as unfinished:
            seeds = SEEDS[f"pairs_{part}"]
            provenance: dict[str, Any] = {
                "generator": "lit_safety.worlds.toyworld.pairs",
                "part": part,
                "kind": kind or "all",
                "labels": "ground truth of the drawn scene",
                "cost": f"ground truth, not a model's: severity of the harm (size x visible share, a pair counts 1.25) "
                f"in (0, 1.25]; {SAFE_COST} for a safe image, {LOOKALIKE_COST} with a look-alike",
                "score": "ground truth: mean worth of the asked benign things less damage, in [0, 1]; "
                "harm plays no part",
                "held out": "; ".join([HELD_OUT, *([] if part == "test" else [held_out_words()])]),
            }
            with ShardWriter(
                unfinished, samples_per_shard=100, image_format="webp", provenance=provenance,
                seeds={"first": seeds.start, "last": seeds.stop - 1},
            ) as writer:  # fmt: skip
                for pair in pairs(part, count, kind):
                    writer.write(pair.key, pair.metadata, pair.chosen, pair.rejected)
            if part != "test":
                check_held_out(held_out(), [unfinished])
