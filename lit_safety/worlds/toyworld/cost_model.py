"""The toy world's cost model: labelled pairs of its own, and the fit that makes the shipped one.

What limits it is the number of scenes it has seen, so the shipped model learns from tens of thousands of pairs that the
build draws; only the first of them are shipped, for `configs/cost_model.yaml` to show the method.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_safety.core.files import atomic_folder
from lit_safety.core.processes import each
from lit_safety.data.format.manifest import FILE_NAME
from lit_safety.data.format.writer import ShardWriter
from lit_safety.worlds.toyworld.pairs import Pair, make_pair
from lit_safety.worlds.toyworld.seeds import SEEDS

OWNER = "cost_model"
KINDS = ("harmful", "clean_harm", "lookalike", "harmful", "clean_quality")
"""In turn. More look-alikes than alignment pairs have: they are what a cost model takes for harm first. Five, so that
each kind meets all 24 concepts."""
PARTS = {"train": 0, "val": 500_000, "test": 600_000}
"""Fold of things, colours and settings -> its first pair. The last is only ever measured on."""
SHIPPED = {"cost_model": ("train", 360), "cost_model_val": ("val", 120)}
"""Folder -> part, number of pairs."""
PAIRS, WIDTH, STEPS, BATCH, RATE = 40_000, 384, 6000, 128, 3e-3
"""Of the shipped model."""


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
    """Writes the first `count` pairs of a part into `folder`, in one swap. They hold labels and no costs."""
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


def fit_cost_model(clip: Path, train: Path, val: Path, target: Path, work: Path) -> None:
    """As `configs/cost_model.yaml` does, on more pairs and for longer; exports into `target`."""
    from lightning.pytorch import Trainer, seed_everything
    from torch.optim import AdamW
    from torch.optim.lr_scheduler import OneCycleLR

    from lit_safety.callbacks.export import ExportCostModel
    from lit_safety.cost_model.degrade import Degradation
    from lit_safety.data.datamodule import PreferenceDataModule
    from lit_safety.modules.cost_model import CostModel

    seed_everything(0, verbose=False)
    model = CostModel(
        str(clip),
        width=WIDTH,
        degradation=Degradation(views=1),  # with so many pairs, one degraded view of each is enough
        feature_cache=str(work / "features"),
        optimizer=lambda parameters: AdamW(parameters, lr=RATE, weight_decay=0.05),
        lr_scheduler=lambda optimizer: OneCycleLR(optimizer, max_lr=RATE, total_steps=STEPS, pct_start=0.1),
    )
    data = PreferenceDataModule(train=str(train), val=str(val), batch_size=BATCH)
    trainer = Trainer(
        max_steps=STEPS, max_epochs=-1, val_check_interval=STEPS // 4, check_val_every_n_epoch=None,
        num_sanity_val_steps=0, gradient_clip_val=1.0, logger=False, enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False, default_root_dir=str(work), accelerator="cpu",
        callbacks=[ExportCostModel(str(target))],
    )  # fmt: skip
    trainer.fit(model, data)
