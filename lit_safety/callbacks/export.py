"""At the end of a fit: the adapter as stock diffusers reads it, a model card, and the run's resolved config."""

from __future__ import annotations

import shutil
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from lit_safety.adapters.model_card import CardFacts, model_card
from lit_safety.data.atomic import atomic_folder
from lit_safety.errors import UserError
from lit_safety.modules.preference import PreferenceModule


class ExportAdapter(Callback):
    """At fit end writes `adapter/` (weights, README.md, config.yaml); `experts/<category>/` where there are several.

    A module that trains the whole denoiser leaves `pipeline/`, which stock diffusers loads.

    Args:
        folder: where to, instead of `adapter` in the run's folder; several experts go into folders below it.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.export(trainer, pl_module)

    def export(self, trainer: Trainer, pl_module: LightningModule) -> list[Path]:
        """Write all that the module has to leave; returns the folders."""
        if not isinstance(pl_module, PreferenceModule):
            raise UserError(f"{type(self).__name__} writes PreferenceModules, and {type(pl_module).__name__} is none")
        folders = []
        for export in pl_module.exports():
            folder = self._folder(trainer, export)
            with pl_module.exporting(export):  # on every rank: a parameter may lie in pieces on all of them
                if trainer.is_global_zero:
                    self._write(folder, trainer, pl_module, export)
            folders.append(folder)
        return folders

    def _folder(self, trainer: Trainer, export: str) -> Path:
        if self.folder is None:
            return Path(trainer.default_root_dir) / export
        return Path(self.folder) / Path(export).name if "/" in export else Path(self.folder)

    def _write(self, folder: Path, trainer: Trainer, module: PreferenceModule, export: str) -> None:
        with atomic_folder(folder) as partial:
            module.save_export(partial)
            config = Path(trainer.default_root_dir) / "config.yaml"
            if config.is_file():
                shutil.copyfile(config, partial / "config.yaml")
            (partial / "README.md").write_text(model_card(self._facts(trainer, module, export)), encoding="utf-8")
        print(f"{export}: {folder}")

    def _facts(self, trainer: Trainer, module: PreferenceModule, export: str) -> CardFacts:
        data = getattr(trainer, "datamodule", None)
        settings = {name: value for name, value in vars(module.objective).items() if not name.startswith("_")}
        settings["steps"] = trainer.global_step
        group = trainer.optimizers[0].param_groups[0]
        settings |= {"learning_rate": getattr(trainer.optimizers[0], "defaults", group)["lr"]}
        own = module.export_settings(export)
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        if "category" in own:
            metrics = {k: v for k, v in metrics.items() if k.endswith(f"/{own['category']}")}
        return CardFacts(
            base_model=module.pretrained,
            data=str(getattr(data, "train", "unknown")),
            method=f"{type(module).__name__} with {type(module.objective).__name__}",
            settings=settings | own,
            metrics=metrics,
            adapter=export != "pipeline",
        )
