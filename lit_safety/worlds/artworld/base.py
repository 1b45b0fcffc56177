"""The base's training data, and the text encoder, which learns captions' meanings before the UNet is trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import CLIPTokenizer

from lit_safety.core.processes import each
from lit_safety.judges.art.subjects import SETTINGS, STYLES, SUBJECTS
from lit_safety.worlds.artworld.networks import LENGTH, new_text_encoder
from lit_safety.worlds.artworld.sampling import Contents, draw_caption, draw_scene, grade
from lit_safety.worlds.artworld.scene import SIDE, Scene, art, render, to_array
from lit_safety.worlds.artworld.seeds import stream
from lit_safety.worlds.text_training import Lessons, learn_captions

CAPTIONS_EACH = 4
"""Number of captions of one scene; they differ in template and synonyms, and some name the style."""
GRADED = 0.12
"""Share of harms that are smaller or partly hidden."""

_NAMES = ["", *SUBJECTS]
_SETTINGS = ["", *SETTINGS]
_STYLES = ["", *STYLES.values()]
CLASSES = (len(_NAMES), len(_NAMES), len(_SETTINGS), len(_STYLES))
"""How many values each number of `meaning` can take."""


def meaning(scene: Scene, contents: Contents, caption: str) -> list[int]:
    """A caption's meaning as four numbers: first and second subject, setting, style; 0: not named."""
    first, second = (*contents, "")[:2]
    setting = scene.setting if scene.setting in caption.replace(",", " ").split() else ""
    style = STYLES[scene.style] if f"{STYLES[scene.style]} style" in caption else ""
    return [_NAMES.index(first), _NAMES.index(second), _SETTINGS.index(setting), _STYLES.index(style)]


def base_scene(index: int) -> tuple[Scene, list[str]]:
    """The base's scene number `index` and its captions."""
    rng = stream("base", index)
    scene, contents = draw_scene(rng)
    if rng.random() < GRADED:
        scene = grade(rng, scene)
    return scene, [draw_caption(rng, scene, contents) for _ in range(CAPTIONS_EACH)]


def _chunk(task: tuple[int, int, Path]) -> tuple[NDArray[np.uint8], list[list[str]]]:
    start, stop, file = task
    drawn = art(file)
    made = [base_scene(i) for i in range(start, stop)]
    return np.stack([to_array(render(scene, drawn)) for scene, _ in made]), [captions for _, captions in made]


def make_scenes(work: Path, count: int, workers: int = 2) -> None:
    """Writes images.npy (N, SIDE, SIDE, 3) uint8 and captions.npy (N, CAPTIONS_EACH) into the work folder."""
    tasks = [(start, min(start + 500, count), work / "art.npz") for start in range(0, count, 500)]
    images = np.lib.format.open_memmap(work / "images.part.npy", "w+", np.uint8, (count, SIDE, SIDE, 3))
    captions: list[list[str]] = []
    for (start, stop, _), (drawn, said) in zip(tasks, each(_chunk, tasks, workers), strict=True):
        images[start:stop] = drawn
        captions += said
    images.flush()
    np.save(work / "captions.npy", np.array(captions))
    (work / "images.part.npy").rename(work / "images.npy")


def _meanings(owner: str, start: int, count: int) -> tuple[list[str], torch.Tensor]:
    captions, rows = [], []
    for i in range(start, start + count):
        rng = stream(owner, i)
        scene, contents = draw_scene(rng)
        captions.append(draw_caption(rng, scene, contents, synonyms=0.5))
        rows.append(meaning(scene, contents, captions[-1]))
    return captions, torch.tensor(rows)


def compact_ids(tokenizer: CLIPTokenizer, known: NDArray[np.int64], texts: list[str]) -> torch.Tensor:
    """Token ids (B, LENGTH) as indices into the known tokens."""
    ids = tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="np").input_ids
    rows = np.full(len(tokenizer), -1, np.int64)
    rows[known] = np.arange(len(known))
    found = rows[np.asarray(ids)]
    if (found < 0).any():
        raise ValueError("a caption uses a token that is not among the known ones")
    return torch.from_numpy(found)


def train_text_encoder(
    work: Path,
    minutes: float,
    count: int = 60_000,
    batch_size: int = 256,
    lr: float = 2e-3,
    device: str = "cpu",
) -> float:
    """Learns `count` captions and writes text_encoder/ into the work folder.

    A small head predicts from the end token the first subject, the second subject, the setting and the style. Returns
    the share of new captions for which all of these are right.
    """
    tokenizer, known = CLIPTokenizer.from_pretrained(work / "tokenizer"), np.load(work / "known.npy")
    torch.manual_seed(2)
    encoder = new_text_encoder(len(known)).train()
    captions, meanings = _meanings("base", 1_000_000, count)
    fresh, meant = _meanings("checks", 0, 2000)
    ids, fresh_ids = (compact_ids(tokenizer, known, texts) for texts in (captions, fresh))
    lessons = Lessons(ids, meanings, fresh_ids, meant)
    return learn_captions(work, encoder, CLASSES, lessons, minutes, batch_size, lr, device)


def write_caption_ids(work: Path) -> None:
    """Writes ids.npy into the work folder: the captions as `compact_ids`, and the empty caption as the last row."""
    from lit_safety.worlds.denoiser import write_ids

    tokenizer, known = CLIPTokenizer.from_pretrained(work / "tokenizer"), np.load(work / "known.npy")
    captions = np.load(work / "captions.npy")
    ids = compact_ids(tokenizer, known, captions.reshape(-1).tolist()).view(*captions.shape, -1)
    write_ids(work, ids, compact_ids(tokenizer, known, [""])[0])
