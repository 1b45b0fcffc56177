"""The art world's cost model: its own pairs, with every harmless subject, only in seen styles."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lit_safety.core.files import atomic_folder
from lit_safety.core.processes import each
from lit_safety.data.format.manifest import FILE_NAME
from lit_safety.data.format.writer import ShardWriter
from lit_safety.judges.art.subjects import HARMLESS
from lit_safety.worlds.artworld.pairs import Pair, make_pair
from lit_safety.worlds.artworld.scene import art
from lit_safety.worlds.artworld.seeds import SEEDS
from lit_safety.worlds.building import fit_cost_model

if TYPE_CHECKING:
    from pathlib import Path

OWNER = "cost_model"
SETS: dict[str, tuple[int, int]] = {"train": (0, 20_000), "val": (500_000, 600)}
"""Fold of subjects and settings -> its first pair, number of pairs."""


def _chunk(task: tuple[str, int, int, Path]) -> list[Pair]:
    part, start, stop, file = task
    return [make_pair(part, index, art(file), OWNER, HARMLESS) for index in range(start, stop)]


def write_cost_shards(folder: Path, part: str, file: Path, processes: int = 2, count: int | None = None) -> None:
    """Writes a part's pairs into `folder`, which is replaced at once; `file` is art.npz.

    They hold labels but no costs.
    """
    first, usual = SETS[part]
    stop = first + (count or usual)
    with atomic_folder(folder) as unfinished:
        provenance: dict[str, Any] = {
            "generator": "lit_safety.worlds.artworld.cost_model",
            "part": part,
            "for": "training the cost model and nothing else",
            "labels": "ground truth of the drawn scene",
        }
        seeds = SEEDS[OWNER]
        with ShardWriter(
            unfinished, samples_per_shard=480, image_format="webp", provenance=provenance,
            seeds={"first": seeds[first], "last": seeds[stop - 1]},
        ) as writer:  # fmt: skip
            tasks = [(part, start, min(start + 100, stop), file) for start in range(first, stop, 100)]
            for drawn in each(_chunk, tasks, processes):
                for pair in drawn:
                    labels = {key: value for key, value in pair.metadata.items() if key != "cost"}
                    writer.write(pair.key, labels, pair.chosen, pair.rejected)


def make_cost_model(clip: Path, target: Path, work: Path, file: Path, processes: int = 2) -> None:
    """Draws the pairs into `work`, unless they exist there, and fits the model in `target`."""
    for part in SETS:
        if not (work / part / FILE_NAME).exists():
            write_cost_shards(work / part, part, file, processes)
    fit_cost_model(clip, work / "train", work / "val", target, work)
