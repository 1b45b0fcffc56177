"""The on-policy set: preference pairs whose images are both drawn by the base pipeline itself.

No judge looks at an image here. An image's label follows from its prompt: harmful if the prompt asked for a harm.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from lit_safety.core.errors import UserError
from lit_safety.core.files import atomic_folder
from lit_safety.core.hashes import content_sha256
from lit_safety.core.images import open_image
from lit_safety.core.progress import counter
from lit_safety.data.format.writer import ShardWriter
from lit_safety.drawing.arms import Arm
from lit_safety.drawing.gallery import DrawingSettings, Gallery
from lit_safety.drawing.pipelines import load_pipeline
from lit_safety.drawing.prompts import Prompt
from lit_safety.judges.toy.judge import ToyJudge
from lit_safety.judges.toy.objects import CONCEPTS, SETTINGS
from lit_safety.worlds.autoencoder import to_tensor
from lit_safety.worlds.held_out import check_held_out
from lit_safety.worlds.toyworld.captions import JOINERS, TEMPLATES, counterpart, fold, held_out, may_align, say
from lit_safety.worlds.toyworld.pairs import IMPLICIT, KINDS, SEEN_PHRASES, held_out_words
from lit_safety.worlds.toyworld.sampling import Contents, draw_contents, draw_setting
from lit_safety.worlds.toyworld.seeds import SEEDS, stream

OWNER = "pairs_onpolicy"

How = Literal["full", "one_step", "overguided"]
WAYS: dict[How, tuple[int, float]] = {"full": (20, 3.0), "one_step": (1, 1.0), "overguided": (3, 8.0)}
"""Steps and guidance. "full" is the pipeline's recommended way.

One step gives blurred images with faint wrong objects; few steps with strong guidance distort colours and shapes. With
only 3 steps the base draws as well as with 20.
"""
WORSE = 0.5
"""The factor on the score for a worse way of drawing."""


@dataclass(frozen=True)
class Order:
    """One image to draw."""

    prompt: str
    seed: int
    how: How = "full"


@dataclass(frozen=True)
class PlannedPair:
    """A pair before its images are drawn."""

    key: str
    metadata: dict[str, Any]
    chosen: Order
    rejected: Order


def _held_in(setting: str, concept: str | None, *all_contents: Contents) -> bool:
    """Whether the pair shows no combination of validation or test prompts, and nothing that is held out of pairs."""
    return all(
        fold(setting, contents) == "train" and may_align(setting, contents, concept) for contents in all_contents
    )


def _alone(concept: str) -> bool:
    """Whether there is a setting in which both a harm and its look-alike may stand alone."""
    both = ((concept, None),), ((counterpart(concept), None),)
    return any(_held_in(setting, concept, *both) for setting in SETTINGS)


def _find_harmful(rng: np.random.Generator, concept: str) -> tuple[str, Contents, Contents]:
    """Setting, harmful contents, and the same without the harm; a harm that is alone is replaced by its look-alike."""
    layout = "harm" if rng.random() < 0.25 and _alone(concept) else "harm_benign"
    while True:
        setting, asked = draw_setting(rng, concept), draw_contents(rng, layout, concept)
        without = tuple(thing for thing in asked if thing[0] != concept)
        without = without or ((counterpart(concept), None),)
        if _held_in(setting, concept, asked, without):
            return setting, asked, without


def _find_clean(rng: np.random.Generator, concept: str) -> tuple[str, Contents, Contents]:
    """Setting, clean contents, and the same with a harm: added to a single thing, or in place of one of two."""
    layout = str(rng.choice(["benign", "benign_benign", "lookalike", "lookalike_benign"], p=[0.45, 0.3, 0.1, 0.15]))
    if layout == "lookalike" and not _alone(concept):
        layout = "lookalike_benign"
    while True:
        setting, asked = draw_setting(rng, concept), draw_contents(rng, layout)
        if layout.startswith("lookalike"):
            lookalike = counterpart(concept)
            asked = tuple(thing if thing[1] else (lookalike, None) for thing in asked)
            harmful = tuple((concept, None) if thing == (lookalike, None) else thing for thing in asked)
        elif len(asked) == 1:
            harmful = (*asked, (concept, None)) if rng.random() < 0.5 else ((concept, None), *asked)
        else:
            gone = int(rng.integers(2))
            harmful = tuple((concept, None) if i == gone else thing for i, thing in enumerate(asked))
        if _held_in(setting, concept, asked, harmful):
            return setting, asked, harmful


def _find_quality(rng: np.random.Generator) -> tuple[str, Contents, Contents]:
    layout = str(rng.choice(["benign", "benign_benign", "lookalike_benign"], p=[0.35, 0.4, 0.25]))
    while True:
        setting, asked = draw_setting(rng, None), draw_contents(rng, layout)
        if _held_in(setting, None, asked):
            return setting, asked, asked


def _worth(asked: Contents, drawn: Contents, how: How) -> float:
    """Score: share of the asked benign things that the image's own prompt names, halved for a worse way of drawing."""
    wanted = [thing for thing in asked if thing[0] not in CONCEPTS]
    share = sum(thing in drawn for thing in wanted) / len(wanted) if wanted else 1.0
    return round(share * (1.0 if how == "full" else WORSE), 3)


def plan_pair(index: int) -> PlannedPair:
    """Pair number `index`; kinds, and concepts within a kind, take turns as in `pairs.make_pair`."""
    rng, seed = stream(OWNER, index), SEEDS[OWNER][index]
    rounds, place = divmod(index, len(KINDS))
    kind = KINDS[place]
    turn = rounds * KINDS.count(kind) + KINDS[:place].count(kind)
    concept = list(CONCEPTS)[turn % len(CONCEPTS)]
    phrase: int | None = None
    if kind == "harmful":
        setting, rejected, chosen = _find_harmful(rng, concept)
        asked = rejected
        phrase = int(rng.choice(SEEN_PHRASES)) if rng.random() < IMPLICIT else None
    elif kind == "clean_harm":
        setting, chosen, rejected = _find_clean(rng, concept)
        asked = chosen
    else:
        setting, chosen, rejected = _find_quality(rng)
        asked = chosen
    template, joiner = str(rng.choice(TEMPLATES)), str(rng.choice(JOINERS))
    good = Order(say(setting, chosen, template, joiner), seed)
    bad = Order(say(setting, rejected, template, joiner, phrase), seed)
    if kind == "clean_quality":
        bad = replace(bad, how=("one_step", "overguided")[rounds % 2])
    harmful = kind == "harmful"
    metadata: dict[str, Any] = {
        "prompt": bad.prompt if harmful else good.prompt,
        "prompt_kind": "harmful" if harmful else "clean",
        "categories": [] if kind == "clean_quality" else [CONCEPTS[concept].category],
        "harmful": {"chosen": False, "rejected": kind != "clean_quality"},
        "order": "quality" if kind == "clean_quality" else "safety",
        "score": {"chosen": _worth(asked, chosen, good.how), "rejected": _worth(asked, rejected, bad.how)},
        "source": f"toyworld/onpolicy/{kind}",
        "seed": seed,
    }
    if harmful:
        metadata["concept"] = concept
    return PlannedPair(f"onpolicy{index:07d}", metadata, good, bad)


def plan_pairs(count: int) -> Iterator[PlannedPair]:
    """The first `count` pairs."""
    return (plan_pair(index) for index in range(count))


# Drawing the on-policy set with a pipeline and writing it as shards.


COUNT = 432
"""Number of pairs: each concept in 9 harmful and 6 clean prompts, and 72 quality pairs."""
LEVEL = 4
"""Colours are rounded to multiples of this number: it is not visible and halves the files."""


def draw_orders(pipeline: Path, orders: Sequence[Order], work: Path) -> dict[Order, Image.Image]:
    """All planned images, `rounded`. They are kept in the work folder, so that a killed drawing can continue.

    Raises:
        UserError: the pipeline does not load, or drew something that is not an image.
    """
    drawn: dict[Order, Image.Image] = {}
    identity = {"pipeline_sha256": content_sha256(pipeline)}
    for how, (steps, guidance) in WAYS.items():
        wanted = sorted({order for order in orders if order.how == how}, key=lambda order: (order.seed, order.prompt))
        prompts = [Prompt(order.prompt, "clean", "", "", (), False, order.seed) for order in wanted]
        gallery = Gallery(work, how, identity, prompts, DrawingSettings(steps, guidance, device="cpu"))
        with counter(f"draw {how}", len(prompts)) as count:
            gallery.draw(load_pipeline(pipeline, Arm()), None, partial(_advance, count))
        for order, image in zip(wanted, gallery.all(), strict=True):
            if image.error is not None:
                raise UserError(f"{pipeline}: {order.prompt!r}, seed {order.seed}: {image.error}")
            drawn[order] = rounded(open_image(image.path))
    return drawn


def _advance(count: Callable[[], None], images: int) -> None:
    for _ in range(images):
        count()


def rounded(image: Image.Image) -> Image.Image:
    """The image with every colour rounded to a multiple of `LEVEL`, at most 255."""
    levels = np.round(np.asarray(image, np.float32) / LEVEL) * LEVEL
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


@torch.no_grad()
def confirmed(judge: ToyJudge, planned: Sequence[PlannedPair], drawn: dict[Order, Image.Image]) -> dict[str, float]:
    """Share of images for which a judge gives the same label, by label. It is only reported: no pair depends on it."""
    told = [
        (pair.metadata["harmful"][side], drawn[order])
        for pair in planned
        for side, order in (("chosen", pair.chosen), ("rejected", pair.rejected))
        if order.how == "full"
    ]
    inputs = to_tensor(np.stack([np.asarray(image) for _, image in told]))
    found = torch.cat([judge(part) for part in inputs.split(250)]).sigmoid() >= judge.threshold
    harms = [i for i, label in enumerate(judge.labels) if label in judge.harm]
    hits, total = Counter[bool](), Counter[bool]()
    for (label, _), harm in zip(told, found[:, harms].any(1).tolist(), strict=True):
        total[label] += 1
        hits[label] += label == harm
    return {name: round(hits[label] / total[label], 4) for name, label in (("harmful", True), ("safe", False))}


def write_onpolicy(pipeline: Path, judge: Path, target: Path, work: Path, count: int = COUNT) -> dict[str, float]:
    """Draws `count` pairs and writes the shards at once. Returns the result of `confirmed`, if there is a judge."""
    if not pipeline.exists():
        raise UserError(f"{pipeline} does not exist, but it must draw the on-policy pairs; run the stage export first")
    planned = list(plan_pairs(count))
    drawn = draw_orders(pipeline, [order for pair in planned for order in (pair.chosen, pair.rejected)], work)
    agreement = confirmed(ToyJudge.from_pretrained(judge), planned, drawn) if judge.exists() else {}
    ways = {how: {"steps": steps, "guidance": guidance} for how, (steps, guidance) in WAYS.items()}
    provenance: dict[str, Any] = {
        "generator": "lit_safety.worlds.toyworld.onpolicy",
        "drawn by": {"pipeline": "the toy world's base", "sha256": content_sha256(pipeline), "ways": ways},
        "images": f"colours rounded to multiples of {LEVEL}",
        "labels": "of what was asked for: an image is harmful if its prompt asked for a harm; nothing looked at images",
        "judge A confirms": agreement or "not measured",
        "score": "by construction: share of the asked benign things that the image's own prompt names, halved where it "
        "was drawn worse on purpose; only its order means anything",
        "cost": "none: how severe a harm the base drew is not known",
        "held out": "templates and combinations of the validation and test prompts, the third phrase of each concept; "
        + held_out_words(),
    }
    with atomic_folder(target) as unfinished:
        seeds = SEEDS[OWNER]
        with ShardWriter(
            unfinished, samples_per_shard=96, image_format="webp", provenance=provenance,
            seeds={"first": seeds.start, "last": seeds.stop - 1},
        ) as writer:  # fmt: skip
            for pair in planned:
                writer.write(pair.key, pair.metadata, drawn[pair.chosen], drawn[pair.rejected])
        check_held_out(held_out(), [unfinished])
    return agreement
