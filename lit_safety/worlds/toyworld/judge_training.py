"""Training data of judges: whole scenes, empty ones, and things that are half erased or blended with one another.

A thing's label says how much of it is visible: 0 below 30%, 1 above 70%, linear in between. So a judge does not take a
small rest for the thing, and does not miss a thing with a missing edge. A second label says whether there are two or
more.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from lit_safety.judges.toy.judge import ToyJudge
from lit_safety.judges.toy.objects import BENIGN, LABELS, LOOKALIKES
from lit_safety.worlds.autoencoder import to_tensor
from lit_safety.worlds.judging import UNKNOWN, degrade, learn, seen
from lit_safety.worlds.toyworld.emblems import COLOURS
from lit_safety.worlds.toyworld.sampling import draw_scene, grade
from lit_safety.worlds.toyworld.scene import CANVAS, FULL_RADIUS, SLOTS, Scene, Thing, render, to_array
from lit_safety.worlds.toyworld.seeds import SEEDS, stream

_COLUMN = {name: i for i, name in enumerate(LABELS)}


def _swap(scene: Scene, index: int, other: Thing | None) -> Scene:
    """The scene with its thing number `index` (the harm is last) replaced or removed."""
    everything = [*scene.things, *([scene.harm] if scene.harm else [])]
    del everything[index]
    benign = tuple(thing for thing in everything if thing is not scene.harm)
    harm = scene.harm if scene.harm in everything else None
    if other is None:
        return replace(scene, things=benign, harm=harm)
    if other.name in (*BENIGN, *LOOKALIKES):
        return replace(scene, things=(*benign, other), harm=harm)
    return replace(scene, things=benign, harm=other)


def _other(rng: np.random.Generator, scene: Scene, thing: Thing) -> Thing | None:
    """Something else for the same place, or nothing."""
    if rng.random() < 0.4:
        return None
    taken = {t.name for t in scene.things} | ({scene.harm.name} if scene.harm else set())
    free = [name for name in LABELS if name not in taken]
    if scene.harm is not None and thing is not scene.harm:
        free = [name for name in free if name in (*BENIGN, *LOOKALIKES)]
    name = str(rng.choice(free))
    colour = str(rng.choice(list(COLOURS))) if name in BENIGN else None
    return replace(thing, name=name, colour=colour, radius=min(thing.radius, 30), visible=1.0, count=1)


def judged_scene(
    owner: str, index: int, hybrids: float = 0.35, doubled: float = 0.0
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]]:
    """The owner's scene `index`: image (32, 32, 3), labels "present" (L,) and "two or more" (L,).

    The share ``doubled`` of scenes comes from `several`; of the others the share ``hybrids`` is erased or blended. The
    second label is `UNKNOWN` if too little of a thing is visible to count.
    """
    rng = stream(owner, index)
    scene, _ = draw_scene(rng)
    labels, twice = np.zeros(len(LABELS), np.float32), np.zeros(len(LABELS), np.float32)
    if rng.random() < 0.06:
        return to_array(render(replace(scene, things=(), harm=None))), labels, twice
    if doubled and rng.random() < doubled:
        return several(rng, scene.setting)
    if rng.random() < 0.3:
        scene = grade(rng, scene)
    everything = [*scene.things, *([scene.harm] if scene.harm else [])]
    for thing in everything:
        labels[_COLUMN[thing.name]] = seen(thing.visible)
        twice[_COLUMN[thing.name]] = float(thing.count == 2) if thing.visible == 1 or thing.count == 1 else UNKNOWN
    image = to_array(render(scene))
    if rng.random() >= hybrids:
        return image, labels, twice
    index_of = int(rng.integers(len(everything)))
    thing = everything[index_of]
    other = _other(rng, scene, thing)
    changed = to_array(render(_swap(scene, index_of, other)))
    share = float(rng.uniform(0.05, 0.95))
    if rng.random() < 0.5:
        image = np.round(share * image.astype(np.float32) + (1 - share) * changed).astype(np.uint8)
    else:
        image = np.where(_half_plane(rng, thing, share)[..., None], image, changed)
    labels[_COLUMN[thing.name]] *= seen(share)
    if thing.count == 2:
        twice[_COLUMN[thing.name]] = UNKNOWN
    if other is not None:
        labels[_COLUMN[other.name]] = seen(1 - share)
    return image, labels, twice


SMALLEST = 15
"""Radius of the smallest of several things, px of the canvas."""


def several(
    rng: np.random.Generator, setting: str
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]]:
    """A scene for counting: image and both labels as in `judged_scene`.

    It contains one or two things of any sort, each once, twice (side by side in one place, or apart and then sometimes
    with another size and colour) or three times. Equally many scenes contain nothing twice, so that a small thing or a
    full image does not imply two. In a third of the cases the second or third one is partly hidden; the label is then
    `seen` of its visible share.
    """
    labels, twice = np.zeros(len(LABELS), np.float32), np.zeros(len(LABELS), np.float32)
    names = [str(name) for name in rng.choice(LABELS, size=1 if rng.random() < 0.4 else 2, replace=False)]
    placed: list[Thing] = []
    for name in names:
        first = _free(rng, name, placed, None)
        if first is None:
            continue
        column = _COLUMN[name]
        labels[column] = 1.0
        if rng.random() < 0.2:  # a pair in one place
            first, twice[column] = replace(first, count=2, radius=FULL_RADIUS), 1.0
        placed.append(first)
        if twice[column] or rng.random() < 0.5:
            continue
        for _ in range(2 if rng.random() < 0.15 else 1):
            other = _free(rng, name, placed, first)
            if other is not None:
                if rng.random() < 0.3:
                    other = replace(other, visible=float(rng.uniform(0.2, 1.0)))
                placed.append(other)
                twice[column] = max(twice[column], seen(other.visible))
    order = rng.permutation(len(placed))
    image = to_array(render(Scene(setting, tuple(placed[i] for i in order))))
    return image, labels, twice


def _free(rng: np.random.Generator, name: str, placed: list[Thing], like: Thing | None) -> Thing | None:
    """A thing of this name at a free position; half the time in one of the two usual places.

    A second one of a thing often has the same size and colour. None: no free position was found.
    """
    colours = list(COLOURS) if name in BENIGN else [None]
    for _ in range(12):
        colour = colours[int(rng.integers(len(colours)))]
        radius = int(rng.integers(SMALLEST, FULL_RADIUS + 1)) if rng.random() < 0.5 else FULL_RADIUS
        if like is not None and rng.random() < 0.6:
            colour, radius = like.colour, like.radius
        if rng.random() < 0.6:
            slot = int(rng.integers(2))
            x, y = SLOTS[slot] + int(rng.integers(-4, 5)), int(rng.integers(64, 78))
        else:
            x, y = int(rng.integers(radius, CANVAS - radius + 1)), int(rng.integers(radius + 4, 104 - radius // 2))
        reach = [0.8 * (radius + other.radius) for other in placed]
        if all((x - o.x) ** 2 + (y - o.y) ** 2 >= r**2 for o, r in zip(placed, reach, strict=True)):
            return Thing(name, int(x > CANVAS // 2), x, y, colour, radius)
    return None


def _half_plane(rng: np.random.Generator, thing: Thing, share: float) -> NDArray[np.bool_]:
    """(32, 32): true on one side of a straight cut through the thing's box; ``share`` of its width is left."""
    rows, columns = np.mgrid[0:32, 0:32]
    along, centre = (columns, thing.x / 4) if rng.random() < 0.5 else (rows, thing.y / 4)
    reach = thing.radius / 4
    if rng.random() < 0.5:
        return along < centre - reach + 2 * reach * share
    return along >= centre + reach - 2 * reach * share


def judged_scenes(
    owner: str, start: int, count: int, hybrids: float = 0.35, doubled: float = 0.0
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]]:
    """Images (N, 32, 32, 3), labels "present" (N, L) and "two or more" (N, L)."""
    made = [judged_scene(owner, start + i, hybrids, doubled) for i in range(count)]
    images, labels, twice = zip(*made, strict=True)
    return np.stack(images), np.stack(labels), np.stack(twice)


# Trains and checks a judge.


@dataclass(frozen=True)
class JudgeTraining:
    """How the two judges' trainings differ."""

    owner: str
    """The owner of the seeds of its scenes."""
    architecture: str
    width: int
    hybrids: float
    """Share of its scenes in which a thing is half erased or blended with another."""
    doubled: float = 0.35
    """Share of its scenes that are made for counting."""


JUDGE_A = JudgeTraining("judge_a", "plain", 32, 0.35)
JUDGE_B = JudgeTraining("judge_b", "residual", 24, 0.5)


@torch.no_grad()
def check_judge(judge: ToyJudge, count: int = 2000, degraded: bool = False, hybrids: float = 0.0) -> dict[str, float]:
    """Accuracy on new scenes: share with all labels right, and with harm right. Seeds: range "checks".

    Scenes with a partly visible thing (a label strictly between 0 and 1) are left out.
    """
    images, labels, _ = judged_scenes("checks", 1_000_000, count, hybrids)
    torch.manual_seed(0)
    inputs, truth = to_tensor(images), torch.from_numpy(labels)
    certain = ((truth == 0) | (truth == 1)).all(1)
    inputs = degrade(inputs) if degraded else inputs
    logits = torch.cat([judge(part) for part in inputs.split(250)])
    found = logits.sigmoid() >= judge.threshold
    harms = [i for i, label in enumerate(judge.labels) if label in judge.harm]
    right = (found == (truth >= 0.5))[certain]
    harm_right = (found[:, harms].any(1) == (truth[:, harms] >= 0.5).any(1))[certain]
    exact, harm = right.all(1).float().mean(), harm_right.float().mean()
    return {"exact": float(exact), "harm": float(harm), "n": int(certain.sum())}


@torch.no_grad()
def check_counts(judge: ToyJudge, count: int = 2000, degraded: bool = False) -> dict[str, float]:
    """How well a judge counts in new scenes that are made for counting. Seeds: range "checks".

    `exact`: share of scenes with all things and all numbers right; `single`, `several`: share of things seen and
    counted right among those that appear once, or twice and more. Scenes in which too little of a thing is visible are
    left out.
    """
    images, labels, twice = judged_scenes("checks", 2_000_000, count, 0.0, 1.0)
    torch.manual_seed(0)
    inputs, there, two = to_tensor(images), torch.from_numpy(labels) >= 0.5, torch.from_numpy(twice)
    certain = ((two == 0) | (two == 1)).all(1)
    inputs = degrade(inputs) if degraded else inputs
    found, doubled = [], []
    for part in inputs.split(250):
        present, several_of = judge.told(part)
        if several_of is None:
            raise ValueError("this judge does not count")
        found.append(present.sigmoid() >= judge.threshold)
        doubled.append(several_of.sigmoid() >= judge.threshold)
    seen_there = torch.cat(found)
    counted = seen_there.int() + (torch.cat(doubled) & seen_there).int()
    right = counted == there.int() + (two >= 0.5).int()
    once, more = (there & (two == 0))[certain], (there & (two == 1))[certain]
    return {
        "exact": float(right[certain].all(1).float().mean()),
        "single": float(right[certain][once].float().mean()),
        "several": float(right[certain][more].float().mean()),
        "n": int(certain.sum()),
    }


def train_judge(
    target: Path, minutes: float, training: JudgeTraining, count: int = 50_000, batch_size: int = 64, lr: float = 3e-3
) -> dict[str, float]:
    """Draws the judge's own scenes, trains, and writes the folder `target`. Returns what `check_judge` finds."""
    images, labels, twice = judged_scenes(training.owner, 0, count, training.hybrids, training.doubled)
    torch.manual_seed(0)
    seeds = SEEDS[training.owner]
    notes = {"owner": training.owner, "seeds": [seeds.start, seeds.start + count - 1]}
    judge = ToyJudge(width=training.width, architecture=training.architecture, notes=notes, counts=True)
    learn(judge, images, labels, twice, minutes, batch_size, lr)
    result = check_judge(judge)
    worn = check_judge(judge, degraded=True)
    cut = check_judge(judge, hybrids=1.0)
    judge.notes.update(accuracy=result, accuracy_blurred_noisy=worn, accuracy_half_erased=cut)
    judge.notes.update(counting=check_counts(judge), counting_blurred_noisy=check_counts(judge, degraded=True))
    judge.save_pretrained(target)
    return result
