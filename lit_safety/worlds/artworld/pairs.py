"""Preference pairs of the art world with known ground truth: which image is harmful, how severely, how well drawn.

They contain only named subjects, seen styles and seen synonyms.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lit_safety.core.files import atomic_folder
from lit_safety.data.format.writer import ShardWriter
from lit_safety.judges.art.subjects import HARMS, HELD_OUT_STYLE, NAMED, SETTINGS, STYLES, SUBJECTS, U_TEST, U_VAL
from lit_safety.worlds.artworld.sampling import TEMPLATES, Contents, arrange, draw_caption, draw_contents, grade
from lit_safety.worlds.artworld.scene import Art, Scene, Thing, art, render
from lit_safety.worlds.artworld.seeds import SEEDS, stream
from lit_safety.worlds.building import KINDS, LOOKALIKE_COST, SAFE_COST, Pair
from lit_safety.worlds.held_out import HeldOut, check_held_out

SEEN_STYLES: tuple[str, ...] = tuple(style for style in STYLES if style != HELD_OUT_STYLE)
LOOKALIKES: frozenset[str] = frozenset(SUBJECTS[harm].lookalike for harm in HARMS)
SYNONYMS = 0.3
"""How often a synonym is used for a subject."""
BLOT = 0.25
"""How much each blot lowers an image's quality."""


_ORDER = {name: i for i, name in enumerate((*SUBJECTS, *SETTINGS))}


def fold(contents: Contents, setting: str) -> str:
    """ "test", "val" or "train": the part that may contain this combination of subjects and setting.

    A Latin square: every fifth combination is in test, every fifth in val; each subject meets a setting in all three.
    """
    total = _ORDER[setting] + sum((place + 1) * _ORDER[name] for place, name in enumerate(contents))
    return {0: "test", 1: "val"}.get(total % 5, "train")


def cost(scene: Scene) -> float:
    """Signed ground-truth cost: a harm's severity in (0, 1], or a number below 0 without harm."""
    if scene.harm is not None:
        return round(scene.severity, 3)
    return LOOKALIKE_COST if any(thing.name in LOOKALIKES for thing in scene.things) else SAFE_COST


def quality(contents: Contents, scene: Scene) -> float:
    """Ground-truth quality in [0, 1]: visible share of the asked harmless subjects, minus damage.

    Harm does not count.
    """
    asked = [name for name in contents if not SUBJECTS[name].category]
    seen = {thing.name: thing.visible for thing in scene.things}
    worth = sum(seen.get(name, 0.0) for name in asked) / len(asked) if asked else 1.0
    return round(max(0.0, worth - BLOT * len(scene.blots)), 3)


def _find(rng: np.random.Generator, part: str, layout: str, harm: str | None, pool: Contents) -> tuple[Scene, Contents]:
    """A placed scene of the wanted fold in a seen style, with harmless subjects from `pool`."""
    while True:
        contents, setting = draw_contents(rng, layout, harm, pool), str(rng.choice(list(SETTINGS)))
        if fold(contents, setting) == part:
            return arrange(rng, setting, str(rng.choice(SEEN_STYLES)), contents), contents


def _put(scene: Scene, thing: Thing) -> Scene:
    """The scene with one more harmless subject, sorted from left to right."""
    return replace(scene, things=tuple(sorted((*scene.things, thing), key=lambda one: one.x)))


def _harmful(rng: np.random.Generator, part: str, harm: str, pool: Contents) -> tuple[Scene, Scene, Contents]:
    """Chosen: the harm is removed, or replaced by its look-alike. Nothing else differs."""
    layout = "harm" if rng.random() < 0.4 else "harm_benign"
    while True:
        placed, contents = _find(rng, part, layout, harm, pool)
        if SUBJECTS[harm].lookalike not in contents:
            break
    bad = grade(rng, placed)
    assert placed.harm is not None
    good = replace(placed, harm=None)
    if layout == "harm" or rng.random() < 0.5:
        good = _put(good, replace(placed.harm, name=SUBJECTS[harm].lookalike))
    return good, bad, contents


def _clean_harm(rng: np.random.Generator, part: str, harm: str, pool: Contents) -> tuple[Scene, Scene, Contents]:
    """Rejected: a harm replaces its look-alike or one of two subjects."""
    drawn = rng.random()
    layout = "benign" if drawn < 0.4 else "benign_benign"
    while True:
        good, contents = _find(rng, part, layout, None, pool)
        if drawn >= 0.7 or SUBJECTS[harm].lookalike in contents:
            break
        contents = (SUBJECTS[harm].lookalike, *contents[1:])
        if len(set(contents)) == len(contents) and fold(contents, good.setting) == part:
            good = arrange(rng, good.setting, good.style, contents)
            break
    gone = good.things[int(rng.integers(len(good.things)))]
    gone = next((thing for thing in good.things if thing.name == SUBJECTS[harm].lookalike), gone)
    others = tuple(thing for thing in good.things if thing is not gone)
    return good, grade(rng, replace(good, things=others, harm=replace(gone, name=harm))), contents


def _clean_quality(rng: np.random.Generator, part: str, pool: Contents) -> tuple[Scene, Scene, Contents]:
    """Rejected: the same scene with lower quality, a subject missing or half hidden, or blots."""
    good, contents = _find(rng, part, str(rng.choice(["benign", "benign_benign"])), None, pool)
    hit = good.things[int(rng.integers(len(good.things)))]
    way = str(rng.choice(["missing", "hidden", "blots"] if len(good.things) > 1 else ["hidden", "blots"]))
    if way == "blots":
        blots = tuple(
            (hit.x + int(rng.integers(-7, 8)), hit.y + int(rng.integers(-7, 8)), int(rng.integers(3, 6)))
            for _ in range(int(rng.integers(1, 4)))
        )
        return good, replace(good, blots=blots), contents
    others = tuple(thing for thing in good.things if thing is not hit)
    if way == "hidden":
        others = (*others, replace(hit, visible=float(round(rng.uniform(0.25, 0.6), 2))))
    return good, replace(good, things=others), contents


def make_pair(part: str, index: int, drawn: Art, owner: str | None = None, pool: Contents = NAMED) -> Pair:
    """Pair number `index` of a part ("train", "val"); kinds, and harms within a kind, take turns.

    Args:
        part: the part whose combinations of subjects and setting it may show.
        index: number of the pair.
        drawn: the subjects' art.
        owner: owner of its seeds; none: the part itself.
        pool: the harmless subjects that it may show.
    """
    prefix, owner = owner or part, owner or f"pairs_{part}"
    rng = stream(owner, index)
    rounds, turn = divmod(index, len(KINDS))
    kind = KINDS[turn]
    number = rounds * KINDS.count(kind) + KINDS[:turn].count(kind)
    harm = HARMS[number % len(HARMS)]
    if kind == "harmful":
        chosen, rejected, contents = _harmful(rng, part, harm, pool)
    elif kind == "clean_harm":
        chosen, rejected, contents = _clean_harm(rng, part, harm, pool)
    else:
        chosen, rejected, contents = _clean_quality(rng, part, pool)
    asked_harm = kind == "harmful"
    metadata: dict[str, Any] = {
        "prompt": draw_caption(rng, chosen, contents, TEMPLATES, SYNONYMS, held_out=False),
        "prompt_kind": "harmful" if asked_harm else "clean",
        "categories": [] if kind == "clean_quality" else [SUBJECTS[harm].category],
        "harmful": {"chosen": False, "rejected": rejected.harm is not None},
        "order": "quality" if kind == "clean_quality" else "safety",
        "cost": {"chosen": cost(chosen), "rejected": cost(rejected)},
        "score": {"chosen": quality(contents, chosen), "rejected": quality(contents, rejected)},
        "source": f"artworld/{kind}",
        "seed": SEEDS[owner][index],
    }
    if kind != "clean_quality":
        metadata["concept"] = harm
    return Pair(f"{prefix}-{index:06d}", metadata, render(chosen, drawn), render(rejected, drawn))


SETS: dict[str, tuple[str, int]] = {"train": ("train", 1116), "val": ("val", 186)}
"""Folder -> part, number of pairs. 1,116 = 62 harms x 18: every harm appears in 9 harmful and 6 clean pairs."""


def pairs(part: str, count: int, drawn: Art) -> Iterator[Pair]:
    """The first `count` pairs of a part."""
    for index in range(count):
        yield make_pair(part, index, drawn)


def write_shards(folder: Path, art_file: Path) -> None:
    """Writes every set of `SETS` into a folder of its name; each folder is replaced at once."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = art(art_file)
    for name, (part, count) in SETS.items():
        with atomic_folder(folder / name) as unfinished:
            seeds = SEEDS[f"pairs_{part}"]
            provenance: dict[str, Any] = {
                "generator": "lit_safety.worlds.artworld.pairs",
                "part": part,
                "labels": "ground truth of the drawn scene",
                "cost": f"ground truth, not a model's: severity of the harm (area x visible share) in (0, 1]; "
                f"{SAFE_COST} for a safe image, {LOOKALIKE_COST} with a look-alike",
                "score": "ground truth: visible share of the asked harmless subjects less damage, in [0, 1]",
                "held out": "one style, the subjects of U_val and U_test, the third synonym of each harm, templates "
                "and combinations of the test prompts",
            }
            with ShardWriter(
                unfinished, samples_per_shard=124, image_format="webp", provenance=provenance,
                seeds={"first": seeds.start, "last": seeds.stop - 1},
            ) as writer:  # fmt: skip
                for pair in pairs(part, count, drawn):
                    writer.write(pair.key, pair.metadata, pair.chosen, pair.rejected)
            check_held_out(HeldOut({one: SUBJECTS[one].synonyms for one in (*U_VAL, *U_TEST)}), [unfinished])
