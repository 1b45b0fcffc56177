"""A callback that leaves every rank's losses in a file, for tests that compare numbers of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback


class Losses(Callback):
    """Writes `losses-<rank>.json`: the loss of every micro-batch.

    Args:
        folder: where to.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.found: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Lightning has divided it by the number of batches that are accumulated.
        self.found.append(float(outputs["loss"]) * trainer.accumulate_grad_batches)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"losses-{trainer.global_rank}.json").write_text(json.dumps(self.found))


def mean_losses(folder: Path, accumulated: int = 1) -> list[float]:
    """Losses of the optimizer steps, all ranks and so many micro-batches together."""
    ranks = [json.loads(file.read_text()) for file in sorted(folder.glob("losses-*.json"))]
    parts = [sum(batch) / len(ranks) for batch in zip(*ranks, strict=True)]
    return [sum(parts[at : at + accumulated]) / accumulated for at in range(0, len(parts), accumulated)]
