"""Fits the cost model that a world ships, on tens of thousands of its own pairs."""

from pathlib import Path

WIDTH, STEPS, BATCH, RATE = 384, 6000, 128, 3e-3


def fit_cost_model(clip: Path, train: Path, val: Path, target: Path, work: Path) -> None:
    """Fits as `configs/cost_model.yaml` does, but on more pairs and for longer; exports into `target`."""
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
        degradation=Degradation(views=1),  # with so many pairs, one degraded view of each image is enough
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
