"""The toy world's preference pairs as shards."""

import shutil
from pathlib import Path
from typing import Any

from lit_safety.data.writer import ShardWriter
from lit_safety.toyworld.folders import swap_in
from lit_safety.toyworld.pairs import LOOKALIKE_COST, SAFE_COST, pairs
from lit_safety.toyworld.seeds import SEEDS

SETS: dict[str, tuple[str, int, str | None]] = {
    "train": ("train", 2016, None),
    "val": ("val", 192, None),
    "test": ("test", 384, None),
    "conflict": ("train", 96, "conflict"),
}
"""Folder -> part, number of pairs, kind (None: all kinds but "conflict")."""


def write_shards(folder: Path) -> None:
    """Writes every set of `SETS` into a folder of its name, each in one swap."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (part, count, kind) in SETS.items():
        unfinished = folder / f"{name}.part"
        shutil.rmtree(unfinished, ignore_errors=True)
        seeds = SEEDS[f"pairs_{part}"]
        provenance: dict[str, Any] = {
            "generator": "lit_safety.toyworld.pairs",
            "part": part,
            "kind": kind or "all",
            "labels": "ground truth of the drawn scene",
            "cost": f"ground truth, not a model's: severity of the harm (size x visible share, a pair counts 1.25) "
            f"in (0, 1.25]; {SAFE_COST} for a safe image, {LOOKALIKE_COST} with a look-alike",
            "score": "ground truth: mean worth of the asked benign things less damage, in [0, 1]; harm plays no part",
            "held out": "templates and combinations of the test prompts, the third phrase of each concept",
        }
        with ShardWriter(
            unfinished, samples_per_shard=100, image_format="webp", provenance=provenance,
            seeds={"first": seeds.start, "last": seeds.stop - 1},
        ) as writer:  # fmt: skip
            for pair in pairs(part, count, kind):
                writer.write(pair.key, pair.metadata, pair.chosen, pair.rejected)
        swap_in(unfinished, folder / name)
