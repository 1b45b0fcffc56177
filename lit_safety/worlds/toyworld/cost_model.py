"""The toy world's cost model: its own labelled pairs, and the fit of the shipped model.

Its quality is limited by the number of training scenes, so the shipped model learns from tens of thousands of pairs
that the build draws. Only the first of them are shipped, so that `configs/cost_model.yaml` can show the method.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_safety.core.files import atomic_folder
from lit_safety.core.processes import each
from lit_safety.data.format.manifest import FILE_NAME
from lit_safety.data.format.writer import ShardWriter
from lit_safety.worlds.building import fit_cost_model
from lit_safety.worlds.toyworld.pairs import Pair, make_pair
from lit_safety.worlds.toyworld.seeds import SEEDS

OWNER = "cost_model"
KINDS = ("harmful", "clean_harm", "lookalike", "harmful", "clean_quality")
"""The kinds, in turn.

There are more look-alikes than in alignment pairs, because a cost model mistakes these for harm most easily. There are
five kinds, so that each kind meets all 24 concepts.
"""
PARTS = {"train": 0, "val": 500_000, "test": 600_000}
"""Fold of things, colours and settings -> number of its first pair. The last fold is only used for measuring."""
SHIPPED = {"cost_model": ("train", 360), "cost_model_val": ("val", 120)}
"""Folder -> part, number of pairs."""
PAIRS = 40_000
"""The training pairs of the shipped model."""


def cost_pair(part: str, index: int) -> Pair:
    """Pair number `index` of a part ("train", "val") of the cost model's pairs."""
    return make_pair(part, PARTS[part] + index, KINDS[index % len(KINDS)], OWNER)


def _chunk(bounds: tuple[str, int, int]) -> list[Pair]:
    part, start, stop = bounds
    return [cost_pair(part, index) for index in range(start, stop)]


def _pairs(part: str, count: int, processes: int) -> Iterator[Pair]:
    bounds = [(part, start, min(start + 100, count)) for start in range(0, count, 100)]
    for drawn in each(_chunk, bounds, processes):
        yield from drawn


def write_cost_shards(folder: Path, part: str, count: int, processes: int = 2) -> None:
    """Writes the first `count` pairs of a part into `folder`, which is replaced at once.

    They hold labels but no costs.
    """
    with atomic_folder(folder) as unfinished:
        provenance: dict[str, Any] = {
            "generator": "lit_safety.worlds.toyworld.cost_model",
            "part": part,
            "for": "training the cost model and nothing else",
            "labels": "ground truth of the drawn scene",
        }
        start = SEEDS[OWNER].start + 1_000_000 + PARTS[part]  # where numbered kinds begin
        with ShardWriter(
            unfinished, samples_per_shard=480, image_format="webp", provenance=provenance,
            seeds={"first": start, "last": start + count - 1},
        ) as writer:  # fmt: skip
            for pair in _pairs(part, count, processes):
                metadata = {key: value for key, value in pair.metadata.items() if key != "cost"}
                writer.write(pair.key, metadata, pair.chosen, pair.rejected)


def make_cost_model(clip: Path, shards: Path, target: Path, work: Path, processes: int = 2) -> None:
    """Writes the shipped sets into `shards`, draws many more pairs into `work`, and fits the model in `target`."""
    for name, (part, count) in SHIPPED.items():
        write_cost_shards(shards / name, part, count, processes)
    if not (work / "train" / FILE_NAME).exists():
        write_cost_shards(work / "train", "train", PAIRS, processes)
    fit_cost_model(clip, work / "train", shards / "cost_model_val", target, work)
