"""Printed once at the start: the effective batch, the learning rate, what is trained, where it is written."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback


class RunSummary(Callback):
    """Prints the numbers that published trainers leave one to guess."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        per_rank = getattr(getattr(trainer, "datamodule", None), "batch_size", None)
        accumulation, ranks = trainer.accumulate_grad_batches, trainer.world_size
        trained = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        rates = sorted({f"{group['lr']:.3g}" for one in trainer.optimizers for group in one.param_groups})
        if per_rank is not None:
            print(f"batch   {per_rank} pairs x {accumulation} accumulated x {ranks} ranks = "
                  f"{per_rank * accumulation * ranks} pairs an optimizer step")  # fmt: skip
        print(f"rate    {', '.join(rates)} at the next step; not scaled by the batch")
        print(f"trained {trained:,} parameters in fp32")
        print(f"folder  {trainer.default_root_dir}")
