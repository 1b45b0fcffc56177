"""The art world's CLIP, the frozen backbone of its cost model; reports never score with it.

It learns only from seen styles, so that a reward never knows the held-out style.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import CLIPModel, CLIPTokenizer

from lit_safety.core.processes import each
from lit_safety.judges.art.subjects import HARMLESS, HARMS, SETTINGS, STYLES, SUBJECTS
from lit_safety.worlds.artworld.base import CLASSES, compact_ids, meaning
from lit_safety.worlds.artworld.networks import LENGTH
from lit_safety.worlds.artworld.pairs import SEEN_STYLES
from lit_safety.worlds.artworld.sampling import TEMPLATES, Contents, arrange, draw_caption, draw_scene, grade
from lit_safety.worlds.artworld.scene import SIDE, Scene, art, render, to_array
from lit_safety.worlds.artworld.seeds import SEEDS, stream
from lit_safety.worlds.contrastive import (
    Families,
    encode_images,
    new_clip,
    save_image_tower,
    text_features,
    train_clip,
    write_families,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Member = tuple[NDArray[np.uint8], list[str], list[int]]

PATCH = 6
FAMILY = 4
"""Scenes of a family: one, and three in which one subject, the style or the setting is replaced."""
CAPTIONS_EACH = 3
WHOLE = tuple(template for template in TEMPLATES if "{setting}" in template)
"""Templates of captions that name everything, so that each image of a batch has exactly one right caption."""
GRADED = 0.3
"""Share of harms that are smaller or partly hidden."""


def new_art_clip(work: Path) -> CLIPModel:
    """An untrained CLIP for 48x48 images, 8x8 patches, over the tokens that captions use."""
    tokens = len(np.load(work / "known.npy"))
    return new_clip(SIDE, PATCH, LENGTH, CLIPTokenizer.from_pretrained(work / "tokenizer"), tokens)


def _changed(rng: np.random.Generator, scene: Scene, contents: Contents) -> tuple[Scene, Contents]:
    """The same with one thing replaced: a subject (half the time a harm by its look-alike), style or setting."""
    drawn = rng.random()
    if drawn < 0.15:
        return replace(scene, style=str(rng.choice([one for one in SEEN_STYLES if one != scene.style]))), contents
    if drawn < 0.3:
        return replace(scene, setting=str(rng.choice([one for one in SETTINGS if one != scene.setting]))), contents
    hit = int(rng.integers(len(contents)))
    near = _near(contents[hit])
    pool = near if near and rng.random() < 0.5 else (HARMS if SUBJECTS[contents[hit]].category else HARMLESS)
    allowed = [name for name in pool if name not in contents and not _second_harm(name, contents, hit)]
    if not allowed:
        return scene, contents
    other = (*contents[:hit], str(rng.choice(allowed)), *contents[hit + 1 :])
    return arrange(rng, scene.setting, scene.style, other), other


def _near(name: str) -> tuple[str, ...]:
    """A harm's look-alike, or the harms whose look-alike this subject is."""
    if SUBJECTS[name].category:
        return (SUBJECTS[name].lookalike,)
    return tuple(harm for harm in HARMS if SUBJECTS[harm].lookalike == name)


def _second_harm(name: str, contents: Contents, hit: int) -> bool:
    others = (*contents[:hit], *contents[hit + 1 :])
    return SUBJECTS[name].category is not None and any(SUBJECTS[one].category for one in others)


def draw_family(owner: str, index: int, file: Path) -> list[Member]:
    """Image (SIDE, SIDE, 3), captions and meaning of each scene of family number `index`."""
    rng, drawn = stream(owner, index), art(file)
    first = draw_scene(rng, SEEN_STYLES)
    scenes = [first, *(_changed(rng, *first) for _ in range(FAMILY - 1))]
    members: list[Member] = []
    for scene, contents in scenes:
        shown = grade(rng, scene) if rng.random() < GRADED else scene
        said = [draw_caption(rng, scene, contents, WHOLE, synonyms=0.3, style=1.0) for _ in range(CAPTIONS_EACH)]
        members.append((to_array(render(shown, drawn)), said, meaning(scene, contents, said[0])))
    return members


def _chunk(task: tuple[str, int, int, Path]) -> list[list[Member]]:
    owner, start, stop, file = task
    return [draw_family(owner, index, file) for index in range(start, stop)]


def _families(work: Path, owner: str, start: int, count: int, workers: int) -> Families:
    tasks = [(owner, i, min(i + 250, start + count), work / "art.npz") for i in range(start, start + count, 250)]
    members = [member for part in each(_chunk, tasks, workers) for family in part for member in family]
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    captions = [caption for _, said, _ in members for caption in said]
    ids = compact_ids(tokenizer, np.load(work / "known.npy"), captions).numpy()
    return Families(
        np.stack([image for image, _, _ in members]).reshape(count, FAMILY, SIDE, SIDE, 3),
        ids.reshape(count, FAMILY, CAPTIONS_EACH, -1),
        np.array([meant for _, _, meant in members]).reshape(count, FAMILY, -1),
    )


@torch.no_grad()
def retrieval(clip: CLIPModel, families: Families) -> float:
    """Share of images that are nearest to a caption of their own meaning, among the captions of their family."""
    count = len(families.images)
    images = encode_images(clip, families.images.reshape(-1, SIDE, SIDE, 3)).view(count, FAMILY, -1)
    ids = torch.from_numpy(families.ids[:, :, 0].reshape(count * FAMILY, -1))
    texts = torch.cat([text_features(clip, part)[1] for part in ids.split(500)]).view(count, FAMILY, -1)
    nearest = (images @ texts.mT).argmax(2).numpy()
    meant = np.take_along_axis(families.meanings, nearest[..., None], 1)
    return float((meant == families.meanings).all(2).mean())


def make_clip(
    work: Path, target: Path, minutes: float, processes: int, families: int = 24_000, device: str = "cpu"
) -> None:
    """Draws families, trains, measures and writes the image tower into `target`; a GPU trains four times as many in a
    step."""
    if not (work / "clip_pictures.npy").exists():
        write_families(work, _families(work, "clip", 0, families, processes))
    # The heads stay on: the cost model needs to know all 217 subjects, and few captions of a batch differ in only one.
    world, size = (processes, 16) if device == "cpu" else (1, 64)
    clip, trained = train_clip(
        work, new_art_clip, CLASSES, minutes, size, world=world, heads_until=math.inf, device=device
    )
    found = retrieval(clip, _families(work, "checks", 20_000, 500, 1))
    notes = {
        "made by": "python -m lit_safety artworld build --stages '[clip]'",
        "for": "the backbone of the art world's cost model; no report scores with it",
        "styles": [STYLES[style] for style in SEEN_STYLES],
        "seeds": [SEEDS["clip"].start, SEEDS["clip"].start + families - 1],
        "caption found among four that differ in one thing": round(found, 4),
        **{key: round(value, 2) for key, value in trained.items()},
    }
    save_image_tower(clip, target, "# The art world's CLIP, image tower\n\n" + json.dumps(notes, indent=1) + "\n")
    print(f"clip: {found:.1%} of new images find their caption among four that differ in one thing")
