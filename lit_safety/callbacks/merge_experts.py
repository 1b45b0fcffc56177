"""At the end of a fit of several experts: each in a folder of its own, and all of them merged into one LoRA."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy

from lit_safety.adapters.lora import WEIGHTS_NAME
from lit_safety.backbones.load import load_backbone
from lit_safety.callbacks.export import ExportAdapter
from lit_safety.core.categories import canonical_category
from lit_safety.core.errors import UserError
from lit_safety.core.progress import counter
from lit_safety.data.protocols import WithTrain, datamodule_of
from lit_safety.merging.calibration import calibrate, check_prompts, has_categories
from lit_safety.merging.experts import Expert, read_experts, united_layers
from lit_safety.merging.merge_experts import merge_experts, report, table
from lit_safety.merging.methods import Activity
from lit_safety.merging.options import CalibrationOptions, Recipe
from lit_safety.merging.output import REPORT_NAME, write_merge
from lit_safety.modules.preference import PreferenceModule


class MergeExperts(ExportAdapter):
    """Writes `experts/<category>/` as ExportAdapter does, and `adapter/`: the merged LoRA, its card and report.json.

    The options are those of the command `merge`, which merges the same folders again, with others or in another way.
    A fit of one category leaves its expert as `adapter/`.

    Args:
        weights: a weight for each category; null weighs all 1. Not for comerge.
        calibration: comerge: the prompts and how they are looked at; `prompts: null` takes those of the training
            shards, `categories: null` the experts' own where the prompts have any.
        **settings: how they are merged, see `Recipe`.
    """

    def __init__(
        self,
        weights: dict[str, float] | None = None,
        calibration: CalibrationOptions | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        try:
            named = {canonical_category(name): weight for name, weight in (weights or {}).items()}
        except UserError as error:
            raise UserError(f"`MergeExperts.weights`: {error}") from error
        self.recipe = Recipe(weights=named, **settings)
        self.calibration = calibration or CalibrationOptions()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Complain before the training about what could not be merged after it."""
        if not isinstance(pl_module, PreferenceModule):
            raise UserError(f"MergeExperts writes PreferenceModules, and {type(pl_module).__name__} is none")
        names = [Path(export).name for export in pl_module.exports()]
        if unknown := sorted(set(self.recipe.weights) - set(names)):
            raise UserError(f"`MergeExperts.weights` names {', '.join(unknown)}; the experts are {', '.join(names)}")
        if self.recipe.calibrated and len(names) > 1:
            source, options = self._prompts(trainer, names)
            check_prompts(source, options.categories)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, PreferenceModule)
        folders = self.export(trainer, pl_module)
        if trainer.is_global_zero and len(folders) > 1:
            self._merge(folders, trainer, pl_module)

    def _merge(self, folders: list[Path], trainer: Trainer, module: PreferenceModule) -> None:
        experts = read_experts([f"{folder.name}={folder}" for folder in folders])
        activity = measured = None
        begun = time.monotonic()
        if self.recipe.calibrated and len(experts) > 1:
            activity, measured = self._calibrated(experts, trainer, module)
        calibrated = time.monotonic()
        with counter("merging layers", len(united_layers(experts))) as tick:
            merged = merge_experts(experts, self.recipe, activity, tick)
        seconds = {"calibration": calibrated - begun, "merging": time.monotonic() - calibrated}
        out = Path(trainer.default_root_dir) / "adapter"
        write_merge(out, merged, report(merged, experts, self.recipe, measured, seconds), module.pretrained)
        config = Path(trainer.default_root_dir) / "config.yaml"
        if config.is_file():
            shutil.copyfile(config, out / "config.yaml")
        print(f"{table(merged)}\n\nadapter: {out / WEIGHTS_NAME}\nreport:  {out / REPORT_NAME}")

    def _calibrated(
        self, experts: list[Expert], trainer: Trainer, module: PreferenceModule
    ) -> tuple[dict[str, Activity], dict[str, Any]]:
        """The experts' activity in the base model, and what the report says of how it was measured."""
        source, options = self._prompts(trainer, [expert.name for expert in experts])
        backbone = module.backbone  # with its adapter switched off
        # The engine of the fit may hold it sharded, or rounded.
        if isinstance(trainer.strategy, DeepSpeedStrategy | ModelParallelStrategy):
            backbone = load_backbone(module.pretrained)
        # Where it was trained: Lightning has moved it to the CPU by now.
        activity, measured = calibrate(backbone.to(trainer.strategy.root_device), experts, source, options)
        return activity, {**measured, "pipeline": module.pretrained}

    def _prompts(self, trainer: Trainer, names: list[str]) -> tuple[str | list[str], CalibrationOptions]:
        """Where the calibration's prompts are, and the options with the categories that are taken of them."""
        data = datamodule_of(trainer)
        source = self.calibration.prompts or (data.train if isinstance(data, WithTrain) else None)
        if source is None:
            raise UserError("`MergeExperts.calibration.prompts` is not given, and the data names no training shards")
        options = self.calibration
        if options.categories is None and has_categories(source):
            options = replace(options, categories=names)
        return source, options
