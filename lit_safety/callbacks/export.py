"""At the end of a fit: the adapter as stock diffusers reads it, a model card, and the run's resolved config."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from lit_safety.core.errors import UserError
from lit_safety.core.files import atomic_folder
from lit_safety.data.protocols import Batched, Seeded, datamodule_of
from lit_safety.modules.preference import PreferenceModule

# Each callback imports what it needs when it writes, so that a fit of SC-DPO loads neither PSA nor the cost model.
if TYPE_CHECKING:
    pass


class ExportAdapter(Callback):
    """At fit end writes `adapter/` (weights, README.md, config.yaml), or `experts/<category>/` for several experts.

    For a module that trains the whole denoiser it writes `pipeline/`, which stock diffusers loads.

    Args:
        folder: the output folder instead of `adapter` in the run's folder; several experts go into folders below it.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.export(trainer, pl_module)

    def export(self, trainer: Trainer, pl_module: LightningModule) -> list[Path]:
        """Write everything that the module exports; returns the folders."""
        if not isinstance(pl_module, PreferenceModule):
            raise UserError(f"{type(self).__name__} exports PreferenceModules, not a {type(pl_module).__name__}")
        folders = []
        for export in pl_module.exports():
            folder = self._folder(trainer, export)
            with pl_module.exporting(export):  # on every rank: a parameter may be sharded over all of them
                if trainer.is_global_zero:
                    self._write(folder, trainer, pl_module, export)
            folders.append(folder)
        return folders

    def _folder(self, trainer: Trainer, export: str) -> Path:
        if self.folder is None:
            return Path(trainer.default_root_dir) / export
        return Path(self.folder) / Path(export).name if "/" in export else Path(self.folder)

    def _write(self, folder: Path, trainer: Trainer, module: PreferenceModule, export: str) -> None:
        from lit_safety.callbacks.cards import adapter_card
        from lit_safety.report.card import card_text

        with atomic_folder(folder) as partial:
            module.save_export(partial)
            config = Path(trainer.default_root_dir) / "config.yaml"
            if config.is_file():
                shutil.copyfile(config, partial / "config.yaml")
            (partial / "README.md").write_text(card_text(adapter_card(trainer, module, export)), encoding="utf-8")
        print(f"{export}: {folder}")


# At the end of a fit: the cost model's folder, as `shards score`, `SCDPO` and `evaluate` load it.


class ExportCostModel(Callback):
    """Writes `cost_model/` with config.json, model.safetensors and a model card at fit end.

    Args:
        folder: the output folder; null: `cost_model` in the run's folder.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        from lit_safety.callbacks.cards import train_shards
        from lit_safety.cost_model.files import save_cost_model
        from lit_safety.modules.cost_model import CostModel

        if not isinstance(pl_module, CostModel):
            raise UserError(f"ExportCostModel exports a CostModel, but {type(pl_module).__name__} is not one")
        if not trainer.is_global_zero:
            return
        folder = Path(self.folder or Path(trainer.default_root_dir) / "cost_model")
        data = datamodule_of(trainer)
        per_rank = data.batch_size if isinstance(data, Batched) else 0
        loss = {name: value for name, value in vars(pl_module.loss).items() if not name.startswith("_")}
        settings = {
            "data": train_shards(trainer),
            "loss": type(pl_module.loss).__name__,
            **loss,
            "degradation": vars(pl_module.degradation),
            "steps": trainer.global_step,
            "pairs a step": per_rank * trainer.world_size * trainer.accumulate_grad_batches,
            "learning_rate": trainer.optimizers[0].defaults["lr"],
            "seed": data.seed if isinstance(data, Seeded) else None,
        }
        save_cost_model(folder, pl_module.scorer(), pl_module.figures, settings, pl_module.calibration)
        print(f"cost model: {folder}")


# At the end of a fit: the user adapter as `load_psa` reads it, a card, and the run's resolved config.


class ExportUserAdapter(Callback):
    """At fit end writes `adapter/` with user_adapter.safetensors, README.md and config.yaml.

    Users' embeddings are not copied: they are personal data, and the adapter may be given to others.

    Args:
        folder: the output folder; null: `adapter` in the run's folder.
        published: also write psa_adapter.bin, which the published code reads; needs `user_tokens: 1`.
    """

    def __init__(self, folder: str | None = None, published: bool = False) -> None:
        self.folder = folder
        self.published = published

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        from lit_safety.modules.psa import PSA

        if not isinstance(pl_module, PSA):
            raise UserError(f"ExportUserAdapter exports PSA, but {type(pl_module).__name__} is not PSA")
        if self.published and pl_module.user_tokens != 1:
            raise UserError(
                f"`ExportUserAdapter.published`: the published layout needs one user token, but `user_tokens` is "
                f"{pl_module.user_tokens}"
            )
        if self.published and pl_module.has_lora:
            raise UserError("`ExportUserAdapter.published`: `lora` must be null: the published layout cannot hold it")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        from lit_safety.adapters.user_file import WEIGHTS_NAME, save_published
        from lit_safety.modules.psa import PSA

        assert isinstance(pl_module, PSA)
        folder = Path(self.folder or Path(trainer.default_root_dir) / "adapter")
        from lit_safety.callbacks.cards import user_card
        from lit_safety.report.card import card_text

        with pl_module.exporting("adapter"):  # on every rank: a parameter may be sharded over all of them
            if trainer.is_global_zero:
                with atomic_folder(folder) as partial:
                    pl_module.save_export(partial)
                    if self.published:
                        save_published(pl_module.adapter, partial / "psa_adapter.bin")
                    config = Path(trainer.default_root_dir) / "config.yaml"
                    if config.is_file():
                        shutil.copyfile(config, partial / "config.yaml")
                    (partial / "README.md").write_text(card_text(user_card(trainer, pl_module)), encoding="utf-8")
                print(f"adapter: {folder / WEIGHTS_NAME}")
