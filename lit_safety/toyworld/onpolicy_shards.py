"""Draws the on-policy set with a pipeline and writes it as shards."""

import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lit_safety.data.images import open_image
from lit_safety.data.progress import counter
from lit_safety.data.writer import ShardWriter
from lit_safety.errors import UserError
from lit_safety.evaluation.arms import Arm
from lit_safety.evaluation.drawing import DrawingSettings, Gallery
from lit_safety.evaluation.fingerprint import fingerprint
from lit_safety.evaluation.pipelines import load_pipeline
from lit_safety.evaluation.prompts import Prompt
from lit_safety.toyworld.folders import swap_in
from lit_safety.toyworld.judge import ToyJudge
from lit_safety.toyworld.onpolicy import OWNER, WAYS, Order, PlannedPair, plan_pairs
from lit_safety.toyworld.seeds import SEEDS
from lit_safety.toyworld.vae import to_tensor

COUNT = 432
"""Pairs: each concept in 9 harmful prompts and 6 clean ones, and 72 of quality."""
LEVEL = 4
"""Colours are rounded to multiples of this, which nobody sees and which halves the files."""


def draw_orders(pipeline: Path, orders: Sequence[Order], work: Path) -> dict[Order, Image.Image]:
    """Every ordered image, `rounded`. They are kept in the work folder, so a drawing that was killed goes on.

    Raises:
        UserError: the pipeline does not load or drew a picture that is none.
    """
    drawn: dict[Order, Image.Image] = {}
    identity = {"pipeline_sha256": fingerprint(pipeline)}
    for how, (steps, guidance) in WAYS.items():
        wanted = sorted({order for order in orders if order.how == how}, key=lambda order: (order.seed, order.prompt))
        prompts = [Prompt(order.prompt, "clean", "", "", (), False, order.seed) for order in wanted]
        gallery = Gallery(work, how, identity, prompts, DrawingSettings(steps, guidance, device="cpu"))
        with counter(f"draw {how}", len(prompts)) as count:
            gallery.draw(load_pipeline(pipeline, Arm()), None, partial(_advance, count))
        for order, picture in zip(wanted, gallery.all(), strict=True):
            if picture.error is not None:
                raise UserError(f"{pipeline}: {order.prompt!r}, seed {order.seed}: {picture.error}")
            drawn[order] = rounded(open_image(picture.path))
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
    """Share of images whose label a judge would have given too, by label. A figure only: no pair depends on it."""
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
    """Draws `count` pairs and writes the shards, in one swap. Returns what `confirmed` finds, if there is a judge."""
    if not pipeline.exists():
        raise UserError(f"{pipeline} is not there, and the on-policy pairs are drawn by it; do the stage export first")
    planned = list(plan_pairs(count))
    drawn = draw_orders(pipeline, [order for pair in planned for order in (pair.chosen, pair.rejected)], work)
    agreement = confirmed(ToyJudge.from_pretrained(judge), planned, drawn) if judge.exists() else {}
    ways = {how: {"steps": steps, "guidance": guidance} for how, (steps, guidance) in WAYS.items()}
    provenance: dict[str, Any] = {
        "generator": "lit_safety.toyworld.onpolicy",
        "drawn by": {"pipeline": "the toy world's base", "sha256": fingerprint(pipeline), "ways": ways},
        "images": f"colours rounded to multiples of {LEVEL}",
        "labels": "of what was asked for: an image is harmful if its prompt asked for a harm; nothing looked at images",
        "judge A confirms": agreement or "not measured",
        "score": "by construction: share of the asked benign things that the image's own prompt names, halved where it "
        "was drawn worse on purpose; only its order means anything",
        "cost": "none: how severe a harm the base drew is not known",
        "held out": "templates and combinations of the validation and test prompts, the third phrase of each concept",
    }
    unfinished = target.with_name(target.name + ".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    seeds = SEEDS[OWNER]
    with ShardWriter(
        unfinished, samples_per_shard=96, image_format="webp", provenance=provenance,
        seeds={"first": seeds.start, "last": seeds.stop - 1},
    ) as writer:  # fmt: skip
        for pair in planned:
            writer.write(pair.key, pair.metadata, drawn[pair.chosen], drawn[pair.rejected])
    target.parent.mkdir(parents=True, exist_ok=True)
    swap_in(unfinished, target)
    return agreement
