"""At the end of a fit of several experts: each in a folder of its own, and all of them merged into one LoRA."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy

from lit_safety.adapters.lora import WEIGHTS_NAME
from lit_safety.backbones import load_backbone
from lit_safety.callbacks.export import ExportAdapter
from lit_safety.data.categories import canonical_category
from lit_safety.data.progress import counter
from lit_safety.errors import UserError
from lit_safety.merging.calibration import calibrate
from lit_safety.merging.calibration_options import CalibrationOptions
from lit_safety.merging.comerge import Activity
from lit_safety.merging.expert import Expert, united_layers
from lit_safety.merging.merge_experts import merge_experts
from lit_safety.merging.output import REPORT_NAME, write_merge
from lit_safety.merging.recipe import Dtype, Method, Recipe, Statistic, Unit
from lit_safety.merging.report import report, table
from lit_safety.merging.sources import read_experts
from lit_safety.modules.preference import PreferenceModule


class MergeExperts(ExportAdapter):
    """Writes `experts/<category>/` as ExportAdapter does, and `adapter/`: the merged LoRA, its card and report.json.

    The options are those of the command `merge`, which merges the same folders again, with others or in another way.
    A fit of one category leaves its expert as `adapter/`.

    Args:
        method: comerge takes each output unit from the expert most active in it; mean and sum are exact; svd is the
            mean truncated to the experts' own rank; ties and dare are the published methods.
        weights: a weight for each category; null weighs all 1. Not for comerge.
        rank: truncate every layer to this rank by SVD; null keeps as much as the method needs.
        density: ties: share of each update's entries that are kept.
        drop: dare: share of each update's entries that are dropped.
        seed: dare: seed of what is dropped.
        statistic: comerge: decide by vote of the calibration prompts or by the mean magnitude over them.
        unit: comerge: take whole rows, which is exact, or single weights, cut to the experts' summed rank.
        normalise: comerge: count every expert's activity in units of its own mean in the layer.
        dtype: number format of the merged adapter; null is float32.
        calibration: comerge: the prompts and how they are looked at; `prompts: null` takes those of the training
            shards, `categories: null` the experts' own.
    """

    def __init__(
        self,
        method: Method = "comerge",
        weights: dict[str, float] | None = None,
        rank: int | None = None,
        density: float = 0.2,
        drop: float = 0.5,
        seed: int = 0,
        statistic: Statistic = "vote",
        unit: Unit = "row",
        normalise: bool = False,
        dtype: Dtype | None = None,
        calibration: CalibrationOptions | None = None,
    ) -> None:
        super().__init__()
        named = {canonical_category(name): weight for name, weight in (weights or {}).items()}
        self.recipe = Recipe(method, named, rank, density, drop, seed, statistic, unit, normalise, dtype)
        self.calibration = calibration or CalibrationOptions()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Complain before the training about what could not be merged after it."""
        if not isinstance(pl_module, PreferenceModule):
            raise UserError(f"MergeExperts writes PreferenceModules, and {type(pl_module).__name__} is none")
        names = [Path(export).name for export in pl_module.exports()]
        if unknown := sorted(set(self.recipe.weights) - set(names)):
            raise UserError(f"`MergeExperts.weights` names {', '.join(unknown)}; the experts are {', '.join(names)}")
        if self.recipe.calibrated and len(names) > 1:
            self._prompts(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, PreferenceModule)
        folders = self.export(trainer, pl_module)
        if trainer.is_global_zero and len(folders) > 1:
            self._merge(folders, trainer, pl_module)

    def _merge(self, folders: list[Path], trainer: Trainer, module: PreferenceModule) -> None:
        experts = read_experts([f"{folder.name}={folder}" for folder in folders])
        activity = measured = None
        if self.recipe.calibrated and len(experts) > 1:
            activity, measured = self._calibrated(experts, trainer, module)
        with counter("merging layers", len(united_layers(experts))) as tick:
            merged = merge_experts(experts, self.recipe, activity, tick)
        out = Path(trainer.default_root_dir) / "adapter"
        write_merge(out, merged, report(merged, experts, self.recipe, measured), module.pretrained)
        config = Path(trainer.default_root_dir) / "config.yaml"
        if config.is_file():
            shutil.copyfile(config, out / "config.yaml")
        print(f"{table(merged)}\n\nadapter: {out / WEIGHTS_NAME}\nreport:  {out / REPORT_NAME}")

    def _calibrated(
        self, experts: list[Expert], trainer: Trainer, module: PreferenceModule
    ) -> tuple[dict[str, Activity], dict[str, Any]]:
        """The experts' activity in the base model, and what the report says of how it was measured."""
        options = self.calibration
        if options.categories is None:
            options = replace(options, categories=[expert.name for expert in experts])
        backbone = module.backbone  # with its adapter switched off
        if isinstance(trainer.strategy, DeepSpeedStrategy):  # whose engine may hold it in pieces, or rounded
            backbone = load_backbone(module.pretrained).to(module.device)
        activity, measured = calibrate(backbone, experts, self._prompts(trainer), options)
        return activity, {**measured, "pipeline": module.pretrained}

    def _prompts(self, trainer: Trainer) -> str | list[str]:
        source = self.calibration.prompts or getattr(getattr(trainer, "datamodule", None), "train", None)
        if source is None:
            raise UserError("`MergeExperts.calibration.prompts` is not given, and the data names no training shards")
        return source
