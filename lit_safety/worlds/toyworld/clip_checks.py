"""Checks of the toy CLIP: does it find an image's caption, notice one wrong word in it, and recognise harm?"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTokenizer

from lit_safety.judges.toy.objects import CONCEPTS
from lit_safety.worlds.autoencoder import to_tensor
from lit_safety.worlds.contrastive import encode_images, image_features, save_clip
from lit_safety.worlds.toyworld.captions import JOINERS, TEMPLATES, say
from lit_safety.worlds.toyworld.clip import (
    Meaning,
    draw_meaning,
    encode_texts,
    exchange,
    possible,
    train_toy_clip,
)
from lit_safety.worlds.toyworld.sampling import draw_scene
from lit_safety.worlds.toyworld.seeds import SEEDS, stream
from lit_safety.worlds.toyworld.text import build_tokenizer


@dataclass(frozen=True)
class Scenes:
    """Images (N, 32, 32, 3) uint8 and what each shows."""

    images: NDArray[np.uint8]
    meanings: list[Meaning]

    @property
    def concepts(self) -> list[str | None]:
        """The harm in each, or None."""
        return [next((name for name, _ in m.contents if name in CONCEPTS), None) for m in self.meanings]


def fresh_meanings(owner: str, start: int, count: int) -> list[Meaning]:
    """The meanings of the owner's scenes from number `start` on."""
    found = []
    for index in range(start, start + count):
        scene, contents = draw_scene(stream(owner, index))
        found.append(Meaning(scene.setting, contents))
    return found


def fresh_scenes(owner: str, start: int, count: int) -> Scenes:
    """The owner's scenes from number `start` on, harms graded as in training."""
    meanings = fresh_meanings(owner, start, count)
    drawn = [draw_meaning(stream(owner, start + i), meaning)[0] for i, meaning in enumerate(meanings)]
    return Scenes(np.stack(drawn), meanings)


def retrieval(clip: CLIPModel, tokenizer: CLIPTokenizer, scenes: Scenes) -> dict[str, float]:
    """Share of images that rank their caption first, and of captions that rank their image first; `n` distinct ones."""
    first = {meaning: i for i, meaning in reversed(list(enumerate(scenes.meanings)))}
    keep = sorted(first.values())
    texts = [say(*scenes.meanings[i], template=TEMPLATES[n % len(TEMPLATES)]) for n, i in enumerate(keep)]
    similarity = encode_images(clip, scenes.images[keep]) @ encode_texts(clip, tokenizer, texts).T
    own = torch.arange(len(keep))
    found = {
        f"to_{what}": (s.argmax(1) == own).float().mean() for what, s in (("text", similarity), ("image", similarity.T))
    }
    return {"n": len(keep), **{name: round(float(share), 4) for name, share in found.items()}}


def ranking(clip: CLIPModel, tokenizer: CLIPTokenizer, scenes: Scenes, implicit: bool = False) -> dict[str, Any]:
    """Compares each scene's caption with the same caption after one change, for every change that a scene allows.

    Returns for each change: `right` (share whose own caption scores higher), `margin` (mean difference of cosine
    similarities) and `n`; and `own`, the mean similarity of own captions.
    """
    features = encode_images(clip, scenes.images)
    texts, rows = [], list[tuple[int, str]]()
    for i, meaning in enumerate(scenes.meanings):
        rng = np.random.default_rng(i)
        how = {
            "template": str(rng.choice(TEMPLATES)),
            "joiner": str(rng.choice(JOINERS)),
            "phrase": int(rng.integers(3)) if implicit else None,
        }
        for change in ("own", *possible(meaning)):
            said = meaning if change == "own" else exchange(rng, meaning, change)  # type: ignore[arg-type]
            texts.append(say(*said, **how))  # type: ignore[arg-type]
            rows.append((i, change))
    encoded = encode_texts(clip, tokenizer, texts)
    scores = (features[[i for i, _ in rows]] * encoded).sum(1)
    own = {i: score for (i, change), score in zip(rows, scores, strict=True) if change == "own"}
    differences: dict[str, list[Tensor]] = {}
    for (i, change), score in zip(rows, scores, strict=True):
        if change != "own":
            differences.setdefault(change, []).append(own[i] - score)
    result: dict[str, Any] = {"own": round(float(torch.stack(list(own.values())).mean()), 3)}
    for change, found in sorted(differences.items()):
        gaps = torch.stack(found)
        right, margin = round(float((gaps > 0).float().mean()), 4), round(float(gaps.mean()), 3)
        result[change] = {"right": right, "margin": margin, "n": len(gaps)}
    return result


def auroc(scores: Tensor, positive: Tensor) -> float:
    """Probability that a positive's score (N,) is above a negative's; ties count half (Mann and Whitney, 1947)."""
    above = scores[positive][:, None] - scores[~positive][None, :]
    return float((above > 0).float().mean() + 0.5 * (above == 0).float().mean())


def fit_line(features: Tensor, positive: Tensor, decay: float = 1e-3) -> nn.Module:
    """Logistic regression by L-BFGS of (N,) labels on (N, D) features, with a squared penalty on the weights."""
    line = nn.Linear(features.shape[1], 1)
    nn.init.zeros_(line.weight)
    nn.init.zeros_(line.bias)
    return _fit(line, features, positive, decay)


def fit_mlp(features: Tensor, positive: Tensor, hidden: int = 64, decay: float = 1e-4) -> nn.Module:
    """The same with one hidden layer, initialised with seed 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = (nn.Linear(features.shape[1], hidden), nn.GELU(), nn.Linear(hidden, 1))
    return _fit(nn.Sequential(*layers), features, positive, decay)


def _fit(head: nn.Module, features: Tensor, positive: Tensor, decay: float) -> nn.Module:
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")
    weights = [parameter for parameter in head.parameters() if parameter.ndim == 2]

    def closure() -> float:
        optimizer.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(head(features)[:, 0], positive.float())
        loss = loss + decay * torch.stack([weight.square().sum() for weight in weights]).sum()
        loss.backward()
        return float(loss.detach())

    optimizer.step(closure)
    return head.requires_grad_(False)


@torch.no_grad()
def _features(clip: CLIPModel, scenes: Scenes, projected: bool) -> Tensor:
    parts = to_tensor(scenes.images).split(250)
    return torch.cat([image_features(clip, part)[int(projected)] for part in parts])


def probe(clip: CLIPModel, learn: Scenes, *checks: Scenes, projected: bool = False) -> list[dict[str, Any]]:
    """Recognition of harm from frozen features: heads are fitted on `learn` and measured on each of `checks`.

    Returns for each of them `any_harm_line` and `any_harm_mlp` (share that is right, AUROC, and AUROC against
    look-alikes only), and the mean and lowest AUROC over concepts, each with its own linear head against everything
    benign.
    """
    known = _features(clip, learn, projected)
    mean, std = known.mean(0), known.std(0)
    known = (known - mean) / std
    harm = torch.tensor([concept is not None for concept in learn.concepts])
    any_harm = {"any_harm_line": fit_line(known, harm), "any_harm_mlp": fit_mlp(known, harm)}
    of_concept = {}
    for concept in CONCEPTS:
        own = torch.tensor([found == concept for found in learn.concepts])
        of_concept[concept] = fit_line(known[own | ~harm], own[own | ~harm])
    found = []
    for check in checks:
        features = (_features(clip, check, projected) - mean) / std
        each = _each_concept(of_concept, features, check)
        worst = min(each, key=lambda name: each[name])
        told: dict[str, Any] = {"n": len(features)}
        told |= {name: _told(head(features)[:, 0], check) for name, head in any_harm.items()}
        told["concept_auroc_mean"] = round(sum(each.values()) / len(each), 4)
        told["concept_auroc_lowest"] = [worst, round(each[worst], 4)]
        found.append(told)
    return found


def _told(scores: Tensor, check: Scenes) -> dict[str, float]:
    harm = torch.tensor([concept is not None for concept in check.concepts])
    near = torch.tensor([any(colour is None for _, colour in meaning.contents) for meaning in check.meanings])
    return {
        "right": round(float(((scores > 0) == harm).float().mean()), 4),
        "auroc": round(auroc(scores, harm), 4),
        "auroc_lookalikes": round(auroc(scores[near], harm[near]), 4),
    }


def _each_concept(lines: dict[str, nn.Module], features: Tensor, check: Scenes) -> dict[str, float]:
    harm = torch.tensor([concept is not None for concept in check.concepts])
    found = {}
    for concept, line in lines.items():
        own = torch.tensor([shown == concept for shown in check.concepts])
        if own.any():
            keep = own | ~harm
            found[concept] = auroc(line(features)[keep, 0], own[keep])
    return found


# Makes data/toyworld/clip: trains, measures on scenes that were not used in training, writes the folder with its
# README.


CHECKS = 3_000_000
"""The first scene of range "checks" that is used to measure CLIP."""

_NOTES = """# CLIP of the toy world

A `transformers` CLIPModel for 32x32 images, trained from scratch on rendered scenes and their captions by
`python -m lit_safety toyworld build --stages '[clip]'`. It is the frozen backbone of a cost model on the toy world, and
computes CLIPScore there. It only knows the words of the toy world.

    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer
    model, tokenizer = CLIPModel.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    processor = CLIPImageProcessorPil.from_pretrained(folder)

Its training drew from seeds {first} to {last} (range "clip"; {families} families of scenes that differ in one thing).
It saw {images:,} images in {minutes:.0f} minutes of wall time. The figures below were measured on scenes of the range
"checks", which were not used in any training; classifiers for harm were fitted on scenes of "cost_model".
`clip_checks.py` of `lit_safety.worlds.toyworld` explains each figure.

```json
{figures}
```
"""


def measure_clip(clip: CLIPModel, tokenizer: CLIPTokenizer, count: int = 2000) -> dict[str, Any]:
    """All figures of the README, on `count` new scenes."""
    fresh, learn = fresh_scenes("checks", CHECKS, count), fresh_scenes("cost_model", 0, 2 * count)
    return {
        "retrieval": retrieval(clip, tokenizer, fresh),
        "ranking": ranking(clip, tokenizer, fresh),
        "ranking_by_phrase": ranking(clip, tokenizer, fresh, implicit=True),
        "harm_pooled": probe(clip, learn, fresh)[0],
        "harm_projected": probe(clip, learn, fresh, projected=True)[0],
    }


def make_clip(work: Path, target: Path, minutes: float, processes: int, families: int = 12_000) -> None:
    """Trains, measures and writes the folder `target`."""
    clip, trained = train_toy_clip(work, minutes, families, world=processes)
    figures = measure_clip(clip, build_tokenizer(work / "clip_tokenizer"))
    notes = _NOTES.format(
        first=SEEDS["clip"].start,
        last=SEEDS["clip"].start + families - 1,
        families=families,
        figures=json.dumps(figures, indent=1),
        **trained,
    )
    save_clip(clip, build_tokenizer, target, notes)
    found = figures["retrieval"]
    print(f"clip: {found['to_text']:.1%} of {found['n']} new images find their caption")
