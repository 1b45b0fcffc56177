"""Real Lightning fits of a tiny module that records what it was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint
from torch import Tensor

from lit_safety.core.chance import uniform
from lit_safety.data import PairBatch, PreferenceDataModule


class Recorder(LightningModule):
    """Three weights with Adam (whose state a resume must bring back), moved by pixels and by each sample's
    chance."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3))
        self.stream: list[tuple[str, int]] = []

    def loss(self, batch: PairBatch) -> Tensor:
        chance = torch.tensor([uniform(seed, "timestep") for seed in batch.seeds]).to(batch.chosen)
        margin = (batch.chosen - batch.rejected).mean(dim=(2, 3)) @ self.weight
        return ((margin - chance) ** 2).mean()

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        self.stream += zip(batch.keys, batch.seeds, strict=True)
        return self.loss(batch)

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), batch_size=len(batch), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.1)


def make_trainer(folder: Path, checkpoint: dict[str, Any] | None = None, **options: Any) -> Trainer:
    """A silent CPU trainer; `checkpoint` are ModelCheckpoint's options, every checkpoint is kept."""
    callbacks: list[Callback] = options.pop("callbacks", [])
    if checkpoint is not None:
        naming = {"dirpath": folder, "filename": "{step:03d}", "auto_insert_metric_name": False}
        callbacks = [*callbacks, ModelCheckpoint(**naming, save_top_k=-1, **checkpoint)]
    options = {
        "num_sanity_val_steps": 0,
        "enable_checkpointing": any(isinstance(one, Checkpoint) for one in callbacks),
        **options,
    }
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=callbacks,
        **options,
    )


def fit(trainer: Trainer, data: PreferenceDataModule, resume: Path | None = None) -> Recorder:
    torch.manual_seed(0)
    module = Recorder()
    trainer.fit(module, datamodule=data, ckpt_path=resume)
    return module
