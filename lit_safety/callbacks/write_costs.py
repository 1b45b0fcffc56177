"""`predict` of a cost model: a cost an image, in a CSV."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from lit_safety.core.tables import csv_lines
from lit_safety.data.format.sample import SIDES

COLUMNS = ("key", "side", "cost", "probability", "harmful")


class WriteCosts(BasePredictionWriter):
    """Writes `costs-0.csv` (one a rank): key, side, cost, probability of harm, and the label if it is known.

    Args:
        folder: the output folder; null: the run's folder.
    """

    def __init__(self, folder: str | None = None) -> None:
        super().__init__(write_interval="batch")
        self.folder = folder

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # If another program started the ranks, only rank 0 knows the run's folder.
        root = trainer.strategy.broadcast(trainer.default_root_dir)
        folder = Path(self.folder or root)
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / f"costs-{trainer.global_rank}.csv"
        with self._file.open("w", encoding="utf-8", newline="") as file:
            file.write(csv_lines([COLUMNS]))

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        labels = {1.0: "true", 0.0: "false"}
        rows = zip(batch.keys, prediction.tolist(), prediction.sigmoid().tolist(), batch.harmful.tolist(), strict=True)
        lines = [
            (key, side, f"{cost:.5f}", f"{probability:.5f}", labels.get(harmful, ""))
            for key, *numbers in rows
            for side, cost, probability, harmful in zip(SIDES, *numbers, strict=True)
        ]
        with self._file.open("a", encoding="utf-8", newline="") as file:
            file.write(csv_lines(lines))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            print(f"costs: {self._file}")
