"""At the end of a fit: the adapter as stock diffusers reads it, a model card, and the run's resolved config."""

from __future__ import annotations

import shutil
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from lit_safety.adapters.lora import WEIGHTS_NAME
from lit_safety.adapters.model_card import CardFacts, model_card
from lit_safety.errors import UserError
from lit_safety.modules.preference import POLICY, PreferenceModule


class ExportAdapter(Callback):
    """Writes `adapter/pytorch_lora_weights.safetensors`, `adapter/README.md` and `adapter/config.yaml` at fit end.

    Args:
        folder: where to; null: `adapter` in the run's folder.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, PreferenceModule):
            raise UserError(f"ExportAdapter writes PreferenceModules, and {type(pl_module).__name__} is none")
        if not trainer.is_global_zero:
            return
        folder = Path(self.folder or Path(trainer.default_root_dir) / "adapter")
        temporary = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        pl_module.backbone.save_lora(temporary, POLICY)
        config = Path(trainer.default_root_dir) / "config.yaml"
        if config.is_file():
            shutil.copyfile(config, temporary / "config.yaml")
        (temporary / "README.md").write_text(model_card(self._facts(trainer, pl_module)), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        temporary.replace(folder)
        print(f"adapter: {folder / WEIGHTS_NAME}")

    def _facts(self, trainer: Trainer, module: PreferenceModule) -> CardFacts:
        data = getattr(trainer, "datamodule", None)
        settings = {name: value for name, value in vars(module.objective).items() if not name.startswith("_")}
        settings |= {"rank": module.lora.rank, "alpha": module.lora.alpha, "steps": trainer.global_step}
        settings |= {"learning_rate": trainer.optimizers[0].defaults["lr"]}
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        return CardFacts(
            base_model=module.pretrained,
            data=str(getattr(data, "train", "unknown")),
            method=f"{type(module).__name__} with {type(module.objective).__name__}",
            settings=settings,
            metrics=metrics,
        )
