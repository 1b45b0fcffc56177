"""At the end of a fit: the cost model's folder, as `shards score`, `SCDPO` and `evaluate` load it."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from lit_safety.cost_model.files import save_cost_model
from lit_safety.errors import UserError
from lit_safety.modules.cost_model import CostModel


class ExportCostModel(Callback):
    """Writes `cost_model/` with config.json, model.safetensors and a model card at fit end.

    Args:
        folder: where to; null: `cost_model` in the run's folder.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, CostModel):
            raise UserError(f"ExportCostModel writes a CostModel, and {type(pl_module).__name__} is none")
        if not trainer.is_global_zero:
            return
        folder = Path(self.folder or Path(trainer.default_root_dir) / "cost_model")
        data = getattr(trainer, "datamodule", None)
        loss = {name: value for name, value in vars(pl_module.loss).items() if not name.startswith("_")}
        settings = {
            "data": getattr(data, "train", "unknown"),
            "loss": type(pl_module.loss).__name__,
            **loss,
            "degradation": vars(pl_module.degradation),
            "steps": trainer.global_step,
            "pairs a step": getattr(data, "batch_size", 0) * trainer.world_size * trainer.accumulate_grad_batches,
            "learning_rate": trainer.optimizers[0].defaults["lr"],
            "seed": getattr(data, "seed", None),
        }
        save_cost_model(folder, pl_module.scorer(), pl_module.figures, settings, pl_module.calibration)
        print(f"cost model: {folder}")
