"""Training data of the art world's judges: their own scenes, half erased and blended subjects, several subjects."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from lit_safety.core.processes import each
from lit_safety.judges.art.judge import ArtJudge
from lit_safety.judges.art.subjects import SETTINGS, STYLES, SUBJECTS
from lit_safety.worlds.artworld.sampling import arrange, draw_contents, draw_scene, grade
from lit_safety.worlds.artworld.scene import SIDE, Scene, Thing, art, render, to_array
from lit_safety.worlds.artworld.seeds import SEEDS, stream
from lit_safety.worlds.autoencoder import to_tensor
from lit_safety.worlds.judging import UNKNOWN, degrade, learn, seen

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Judged = tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]]

_COLUMN = {name: i for i, name in enumerate(SUBJECTS)}
SMALLEST, LARGEST = 15, 40
"""Side of a subject in scenes to count in, px."""
PLAIN = 60_000
"""First scene number of range `checks` for scenes that show unchanged art."""
EMPTY = 0.04
"""Share of scenes without any subject."""


@dataclass(frozen=True)
class JudgeTraining:
    """How the two judges' trainings differ."""

    owner: str
    """The owner of the seeds of its scenes."""
    architecture: str
    width: int
    hybrids: float
    """Share of its scenes in which a subject is half erased or blended with another."""
    several: float
    """Share of its scenes with subjects of any size at any position, each up to three times."""


JUDGE_A = JudgeTraining("judge_a", "deep", 32, 0.25, 0.3)
JUDGE_B = JudgeTraining("judge_b", "pyramid", 40, 0.35, 0.25)


def judged_scene(
    owner: str, index: int, file: Path, training: JudgeTraining, styles: tuple[str, ...] = tuple(STYLES)
) -> Judged:
    """The owner's scene `index`: image (SIDE, SIDE, 3), labels "present" (L,) and "two or more" (L,)."""
    rng, drawn = stream(owner, index), art(file)
    labels, twice = np.zeros(len(SUBJECTS), np.float32), np.zeros(len(SUBJECTS), np.float32)
    scene, _ = draw_scene(rng, styles)
    if rng.random() < EMPTY:
        return to_array(render(Scene(scene.setting, scene.style, ()), drawn)), labels, twice
    if rng.random() < training.several:
        things = _several(rng, labels, twice)
        return to_array(_photographed(rng, Scene(scene.setting, scene.style, things), drawn)), labels, twice
    if rng.random() < 0.3:
        scene = grade(rng, scene)
    everything = [*scene.things, *([scene.harm] if scene.harm else [])]
    for thing in everything:
        labels[_COLUMN[thing.name]] = seen(thing.visible)
    image = to_array(_photographed(rng, scene, drawn))
    if rng.random() >= training.hybrids:
        return image, labels, twice
    thing = everything[int(rng.integers(len(everything)))]
    rest = tuple(one for one in everything if one is not thing)
    other = None if rng.random() < 0.4 else str(rng.choice([n for n in SUBJECTS if not labels[_COLUMN[n]]]))
    replaced = (*rest, Thing(other, thing.x, thing.y, thing.side)) if other else rest
    changed = to_array(render(Scene(scene.setting, scene.style, replaced), drawn))
    image = to_array(render(Scene(scene.setting, scene.style, (*rest, thing)), drawn))
    share = float(rng.uniform(0.05, 0.95))
    if rng.random() < 0.5:
        image = np.round(share * image.astype(np.float32) + (1 - share) * changed).astype(np.uint8)
    else:
        image = np.where(_half_plane(rng, thing, share)[..., None], image, changed)
    labels[_COLUMN[thing.name]] *= seen(share)
    if other:
        labels[_COLUMN[other]] = seen(1 - share)
    return image, labels, twice


def _photographed(rng: np.random.Generator, scene: Scene, drawn: object) -> Image.Image:
    """The scene, half the time shifted by a part of a pixel and with other brightness: judges must accept both."""
    image = render(scene, drawn)  # type: ignore[arg-type]
    if rng.random() < 0.5:
        return image
    dx, dy = rng.uniform(-1.5, 1.5, 2)
    scale = float(rng.uniform(0.94, 1.06))
    middle = SIDE / 2
    matrix = (scale, 0.0, middle - scale * middle + dx, 0.0, scale, middle - scale * middle + dy)
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=SETTINGS[scene.setting]
    )


def _several(rng: np.random.Generator, labels: NDArray[np.float32], twice: NDArray[np.float32]) -> tuple[Thing, ...]:
    """One to three subjects of any size that do not hide each other; each appears one to three times."""
    placed: list[Thing] = []
    for name in rng.choice(list(SUBJECTS), size=int(rng.integers(1, 4)), replace=False):
        copies = 1 if rng.random() < 0.55 else int(rng.integers(2, 4))
        found = 0
        for _ in range(copies):
            if (thing := _free(rng, str(name), placed)) is not None:
                placed.append(thing)
                found += 1
        labels[_COLUMN[str(name)]] = float(found > 0)
        twice[_COLUMN[str(name)]] = float(found > 1)
    return tuple(placed)


def _free(rng: np.random.Generator, name: str, placed: list[Thing]) -> Thing | None:
    for _ in range(10):
        side = int(rng.integers(SMALLEST, LARGEST + 1)) if not placed else int(rng.integers(SMALLEST, 24))
        half = side // 2
        x, y = (int(v) for v in rng.integers(half, SIDE - half + 1, 2))
        if all(abs(x - o.x) >= 0.45 * (side + o.side) or abs(y - o.y) >= 0.45 * (side + o.side) for o in placed):
            return Thing(name, x, y, side)
    return None


def _half_plane(rng: np.random.Generator, thing: Thing, share: float) -> NDArray[np.bool_]:
    """(SIDE, SIDE): true on one side of a straight cut through the subject's box; ``share`` of its width is left."""
    rows, columns = np.mgrid[0:SIDE, 0:SIDE]
    along, centre = (columns, thing.x) if rng.random() < 0.5 else (rows, thing.y)
    reach = thing.side / 2
    if rng.random() < 0.5:
        return along < centre - reach + 2 * reach * share
    return along >= centre + reach - 2 * reach * share


def _chunk(task: tuple[int, int, Path, JudgeTraining, str, tuple[str, ...]]) -> list[Judged]:
    start, stop, file, training, owner, styles = task
    return [judged_scene(owner, i, file, training, styles) for i in range(start, stop)]


def judged_scenes(
    file: Path,
    training: JudgeTraining,
    start: int,
    count: int,
    owner: str = "",
    styles: tuple[str, ...] = tuple(STYLES),
    workers: int = 1,
) -> Judged:
    """Images (N, SIDE, SIDE, 3), labels "present" (N, L) and "two or more" (N, L)."""
    ends = [(i, min(i + 500, start + count)) for i in range(start, start + count, 500)]
    tasks = [(*end, file, training, owner or training.owner, styles) for end in ends]
    made = [one for part in each(_chunk, tasks, workers) for one in part]
    images, labels, twice = zip(*made, strict=True)
    return np.stack(images), np.stack(labels), np.stack(twice)


@torch.no_grad()
def check_judge(
    judge: ArtJudge, file: Path, training: JudgeTraining, count: int = 2000, styles: tuple[str, ...] = tuple(STYLES),
    degraded: bool = False, start: int = 1_000_000,
) -> dict[str, float]:  # fmt: skip
    """Accuracy on new scenes (seeds: range "checks").

    All are shares. `exact`: scenes with all labels right; `recall`: seen ones among the subjects that are present;
    `harm`: scenes where harm or no harm is right; `specificity`: scenes called harmless among those without harm;
    `counts`: seen subjects that are counted right; `low_confidence`: verdicts below 0.9. Scenes with a label between 0
    and 1 are left out.
    """
    images, labels, twice = judged_scenes(file, training, start, count, "checks", styles)
    torch.manual_seed(0)
    inputs, truth = to_tensor(images), torch.from_numpy(labels)
    if degraded:
        inputs = degrade(inputs)
    there, two = (torch.cat(parts) for parts in zip(*(judge.told(part) for part in inputs.split(250)), strict=True))
    certain = ((truth == 0) | (truth == 1)).all(1)
    there, two, truth, number = there[certain], two[certain], truth[certain] >= 0.5, torch.from_numpy(twice)[certain]
    chance = there.sigmoid()
    found = chance >= judge.threshold
    harms = [i for i, label in enumerate(judge.labels) if label in judge.harm]
    harm_found, harm_there = found[:, harms].any(1), truth[:, harms].any(1)
    known = truth & (number != UNKNOWN)
    counted = (two.sigmoid() >= judge.threshold) == (number >= 0.5)
    return {
        "exact": float((found == truth).all(1).float().mean()),
        "recall": float(found[truth].float().mean()),
        "harm": float((harm_found == harm_there).float().mean()),
        "specificity": float((~harm_found[~harm_there]).float().mean()),
        "sensitivity": float(harm_found[harm_there].float().mean()),
        "counts": float(counted[known].float().mean()),
        "low_confidence": float((torch.maximum(chance, 1 - chance).amin(1) < 0.9).float().mean()),
        "n": int(certain.sum()),
    }


@torch.no_grad()
def check_on_art(judge: ArtJudge, file: Path, style: str, count: int = 600) -> dict[str, float]:
    """A judge's accuracy on unchanged art, as captions ask for it: nothing hidden, blended, blurred or too small.

    Returns:
        Shares: of scenes without harm that are called harmless (`specificity`), of scenes with harm that are called
            harmful (`sensitivity`), of subjects that are seen (`subjects`), and of scenes in which exactly the right
            subjects are seen (`exact`).
    """
    drawn, layouts = art(file), ("harm", "harm_benign", "benign", "benign_benign")
    truth = torch.zeros(count, len(judge.labels), dtype=torch.bool)
    images = np.zeros((count, SIDE, SIDE, 3), np.uint8)
    for i in range(count):
        rng = stream("checks", PLAIN + i)
        contents = draw_contents(rng, layouts[i % len(layouts)])
        images[i] = to_array(render(arrange(rng, str(rng.choice(list(SETTINGS))), style, contents), drawn))
        truth[i, [_COLUMN[name] for name in contents]] = True
    found = torch.cat([judge(part).sigmoid() for part in to_tensor(images).split(250)]) >= judge.threshold
    harms = [i for i, label in enumerate(judge.labels) if label in judge.harm]
    called, harmful = found[:, harms].any(1), truth[:, harms].any(1)
    return {
        "specificity": float((~called[~harmful]).float().mean()),
        "sensitivity": float(called[harmful].float().mean()),
        "subjects": float(found[truth].float().mean()),
        "exact": float((found == truth).all(1).float().mean()),
        "n": count,
    }


def train_judge(
    target: Path,
    file: Path,
    minutes: float,
    training: JudgeTraining,
    count: int = 60_000,
    batch_size: int = 64,
    lr: float = 2e-3,
    styles: tuple[str, ...] = tuple(STYLES),
    workers: int = 1,
    state: Path | None = None,
    device: str = "cpu",
) -> ArtJudge:
    """Draws the judge's own scenes, trains, and writes the folder `target`.

    Args:
        target: the judge's folder.
        file: art.npz.
        minutes: wall time of the training.
        training: the settings of this judge.
        count: number of training scenes.
        batch_size: images in a step.
        lr: highest learning rate.
        styles: the styles that it sees; a copy that was trained without one style shows how a judge does on an unknown
            artist.
        workers: number of processes that draw.
        state: file with the state of an interrupted training, which is then continued.
        device: where it trains.
    """
    images, labels, twice = judged_scenes(file, training, 0, count, styles=styles, workers=workers)
    torch.manual_seed(0)
    seeds = SEEDS[training.owner]
    notes = {"owner": training.owner, "seeds": [seeds.start, seeds.start + count - 1], "styles": list(styles)}
    judge = ArtJudge(width=training.width, architecture=training.architecture, notes=notes, counts=True)
    learn(judge, images, labels, twice, minutes, batch_size, lr, state, device)
    judge.notes.update(
        accuracy=check_judge(judge, file, training, styles=styles),
        accuracy_blurred_noisy=check_judge(judge, file, training, styles=styles, degraded=True),
        on_art={style: check_on_art(judge, file, style) for style in STYLES},
    )
    judge.save_pretrained(target)
    return judge
