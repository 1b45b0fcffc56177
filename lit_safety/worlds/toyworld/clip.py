"""The toy world's CLIP: a transformers CLIPModel of 0.65 M parameters for 32x32 images."""

from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from lit_safety.core.processes import each
from lit_safety.judges.toy.objects import BENIGN, CONCEPTS, LOOKALIKES, SETTINGS
from lit_safety.worlds.contrastive import Families, new_clip, text_features, train_clip, write_families
from lit_safety.worlds.toyworld.captions import draw_caption
from lit_safety.worlds.toyworld.emblems import COLOURS
from lit_safety.worlds.toyworld.sampling import Contents, arrange, draw_scene, grade
from lit_safety.worlds.toyworld.scene import SIDE, render, to_array
from lit_safety.worlds.toyworld.seeds import stream
from lit_safety.worlds.toyworld.text import CLASSES, LENGTH, build_tokenizer, tokenize

PATCH = 4


def new_toy_clip(work: Path) -> CLIPModel:
    """An untrained CLIP for 32x32 images: 8x8 patches."""
    return new_clip(SIDE, PATCH, LENGTH, CLIPTokenizer.from_pretrained(work / "clip_tokenizer"))


@torch.no_grad()
def encode_texts(clip: CLIPModel, tokenizer: CLIPTokenizer, texts: list[str], batch_size: int = 500) -> Tensor:
    """Projected features (N, WIDTH) of any number of captions."""
    return torch.cat([text_features(clip, part)[1] for part in tokenize(tokenizer, texts).split(batch_size)])


def load_clip(folder: Path) -> tuple[CLIPModel, CLIPTokenizer]:
    """The shipped CLIP in float32, ready to score."""
    return CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)


# CLIP's training data: families of scenes that differ in one thing each, and their captions.
#
# Independent random scenes differ in so many ways that one object is enough to distinguish them. Within a family the
# whole caption is needed.


Change = Literal["object", "colour", "lookalike", "missing", "order", "setting"]
CHANGES: tuple[Change, ...] = get_args(Change)
"""What changes.

A thing is replaced by another of its sort, a colour changes, a harm and its look-alike are swapped, one of two things
is removed, left and right are swapped, or the setting changes.
"""
_WEIGHTS = {"object": 3, "colour": 3, "lookalike": 3, "missing": 1, "order": 1, "setting": 1}

FAMILY = 4
"""Scenes of a family: one, and three with one change each."""
CAPTIONS_EACH = 3
GRADED = 0.3
"""Share of harms that are smaller, partly hidden or doubled."""


class Meaning(NamedTuple):
    """Everything that a caption says. Captions of the same meaning are right for the same images."""

    setting: str
    contents: Contents


def _other(rng: np.random.Generator, names: tuple[str, ...], contents: Contents) -> str:
    taken = {name for name, _ in contents}
    return str(rng.choice([name for name in names if name not in taken]))


def _sort(name: str) -> tuple[str, ...]:
    return next(sort for sort in (tuple(CONCEPTS), BENIGN, LOOKALIKES) if name in sort)


def possible(meaning: Meaning) -> list[Change]:
    """The changes that this meaning allows."""
    names = [name for name, _ in meaning.contents]
    found: list[Change] = ["object", "setting"]
    if any(colour for _, colour in meaning.contents):
        found.append("colour")
    if any(name not in BENIGN for name in names):
        found.append("lookalike")
    if len(names) == 2:
        found += ["missing", "order"]
    return found


def exchange(rng: np.random.Generator, meaning: Meaning, change: Change) -> Meaning:
    """The meaning with one change; `change` must be `possible`."""
    setting, contents = meaning
    if change == "setting":
        return Meaning(str(rng.choice([name for name in SETTINGS if name != setting])), contents)
    if change == "order":
        return Meaning(setting, contents[::-1])
    which = [i for i, (name, colour) in enumerate(contents) if _fits(change, name, colour)]
    hit = int(rng.choice(which))
    if change == "missing":
        return Meaning(setting, contents[:hit] + contents[hit + 1 :])
    name, colour = contents[hit]
    if change == "object":
        name = _other(rng, _sort(name), contents)
    elif change == "colour":
        colour = str(rng.choice([other for other in COLOURS if other != colour]))
    elif name in CONCEPTS:
        name = CONCEPTS[name].lookalike
    else:
        name = str(rng.choice([harm for harm, concept in CONCEPTS.items() if concept.lookalike == name]))
    return Meaning(setting, (*contents[:hit], (name, colour), *contents[hit + 1 :]))


def _fits(change: Change, name: str, colour: str | None) -> bool:
    if change == "colour":
        return colour is not None
    return name not in BENIGN if change == "lookalike" else True


def draw_family(owner: str, index: int) -> list[tuple[NDArray[np.uint8], list[str], Meaning]]:
    """Image (SIDE, SIDE, 3), captions and meaning of each scene of the owner's family number `index`."""
    rng = stream(owner, index)
    scene, contents = draw_scene(rng)
    meanings = [Meaning(scene.setting, contents)]
    while len(meanings) < FAMILY:
        allowed = possible(meanings[0])
        weights = np.array([_WEIGHTS[change] for change in allowed], float)
        other = exchange(rng, meanings[0], allowed[int(rng.choice(len(allowed), p=weights / weights.sum()))])
        if other not in meanings:
            meanings.append(other)
    return [(*draw_meaning(rng, meaning), meaning) for meaning in meanings]


def draw_meaning(rng: np.random.Generator, meaning: Meaning) -> tuple[NDArray[np.uint8], list[str]]:
    """An image (SIDE, SIDE, 3) and captions of a meaning."""
    scene = arrange(rng, meaning.setting, meaning.contents)
    if rng.random() < GRADED:
        scene = grade(rng, scene)
    captions = [draw_caption(rng, meaning.setting, meaning.contents) for _ in range(CAPTIONS_EACH)]
    return to_array(render(scene)), captions


def _chunk(bounds: tuple[str, int, int]) -> list[list[tuple[NDArray[np.uint8], list[str], Meaning]]]:
    owner, start, stop = bounds
    return [draw_family(owner, index) for index in range(start, stop)]


def make_families(work: Path, tokenizer: "CLIPTokenizer", count: int, workers: int = 2) -> None:
    """Draws the first `count` families of range "clip" into the work folder.

    clip_pictures.npy: (count, FAMILY, SIDE, SIDE, 3) uint8. clip_captions.npz: `ids` (count, FAMILY, CAPTIONS_EACH,
    LENGTH) tokens and `meanings` (count, FAMILY, 5), see `text.meaning`.
    """
    from lit_safety.worlds.toyworld.text import meaning, tokenize

    bounds = [("clip", start, min(start + 250, count)) for start in range(0, count, 250)]
    images, captions, meanings = np.empty((count, FAMILY, SIDE, SIDE, 3), np.uint8), [], []
    families = (family for chunk in each(_chunk, bounds, workers) for family in chunk)
    for index, family in enumerate(families):
        images[index] = [image for image, _, _ in family]
        captions += [caption for _, said, _ in family for caption in said]
        meanings.append([meaning(*meant) for _, _, meant in family])
    ids = tokenize(tokenizer, captions).numpy().reshape(count, FAMILY, CAPTIONS_EACH, -1)
    write_families(work, Families(images, ids, np.array(meanings)))


def train_toy_clip(
    work: Path, minutes: float, families: int = 12_000, batch_size: int = 16, lr: float = 1e-3, world: int = 2
) -> tuple[CLIPModel, dict[str, float]]:
    """Draws `families` from the seed range "clip", unless they exist, and trains; see `train_clip`."""
    tokenizer = build_tokenizer(work / "clip_tokenizer")
    if not (work / "clip_pictures.npy").exists():
        make_families(work, tokenizer, families, world)
    return train_clip(work, new_toy_clip, CLASSES, minutes, batch_size, lr, world)
