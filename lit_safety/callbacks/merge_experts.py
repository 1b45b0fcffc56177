"""At the end of a fit of several experts: each expert in its own folder, and all of them merged into one LoRA."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy

from lit_safety.adapters.lora import WEIGHTS_NAME
from lit_safety.backbones.backbone import Backbone
from lit_safety.backbones.load import load_backbone
from lit_safety.callbacks.export import ExportAdapter
from lit_safety.core.categories import canonical_category
from lit_safety.core.errors import UserError
from lit_safety.data.protocols import WithTrain, datamodule_of
from lit_safety.merging.calibration import check_prompts, has_categories
from lit_safety.merging.experts import read_experts
from lit_safety.merging.kept import keeping
from lit_safety.merging.merge_experts import report, table
from lit_safety.merging.options import NEED_NOTHING, CalibrationOptions, Recipe
from lit_safety.merging.output import REPORT_NAME, write_merge
from lit_safety.merging.own_prompts import check_own_prompts
from lit_safety.merging.run import run
from lit_safety.modules.preference import PreferenceModule


class MergeExperts(ExportAdapter):
    """Writes `experts/<category>/` as ExportAdapter does, and `adapter/`: the merged LoRA, its card and report.json.

    The options are those of the command `merge`, which can merge the same folders again, with other experts or another
    method. A fit of one category leaves its expert as `adapter/`.

    Args:
        weights: a weight for each category; null: 1 for all. Not for comerge.
        calibration: for regmean, comerge and null_space: the prompts and how they are used; `prompts: null` uses those
            of the training shards, `categories: null` the experts' own if the prompts have categories.
        keep_statistics: regmean: keep what was measured in `adapter/statistics`, so that `merge --add_to` can add
            experts later.
        **settings: how they are merged, see `Recipe`.
    """

    def __init__(
        self,
        weights: dict[str, float] | None = None,
        calibration: CalibrationOptions | None = None,
        keep_statistics: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__()
        try:
            named = {canonical_category(name): weight for name, weight in (weights or {}).items()}
        except UserError as error:
            raise UserError(f"`MergeExperts.weights`: {error}") from error
        self.recipe = Recipe(weights=named, **settings)
        self.calibration = calibration or CalibrationOptions()
        self.keep_statistics = keep_statistics
        if keep_statistics and not self.recipe.own_inputs:
            raise UserError(f"`MergeExperts.keep_statistics`: {self.recipe.method} keeps none; take `method: regmean`")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse before the training what could not be merged after it."""
        if not isinstance(pl_module, PreferenceModule):
            raise UserError(f"MergeExperts exports PreferenceModules, but {type(pl_module).__name__} is not one")
        names = [Path(export).name for export in pl_module.exports()]
        if unknown := sorted(set(self.recipe.weights) - set(names)):
            raise UserError(f"`MergeExperts.weights` names {', '.join(unknown)}; the experts are {', '.join(names)}")
        if self.recipe.looks(len(names)):
            source, options = self._prompts(trainer, names)
            if self.recipe.clean_inputs:
                check_own_prompts(source, names, self.recipe, options)
            else:
                check_prompts(source, options.categories)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, PreferenceModule)
        folders = self.export(trainer, pl_module)
        if trainer.is_global_zero and len(folders) > 1:
            self._merge(folders, trainer, pl_module)

    def _merge(self, folders: list[Path], trainer: Trainer, module: PreferenceModule) -> None:
        experts = read_experts([f"{folder.name}={folder}" for folder in folders])
        source, options = None, self.calibration
        if self.recipe.looks(len(experts)):
            source, options = self._prompts(trainer, [expert.name for expert in experts])
        out = Path(trainer.default_root_dir) / "adapter"

        def model() -> tuple[Backbone, str]:
            return _backbone(trainer, module), module.pretrained

        with keeping(out, self.keep_statistics) as keeper:
            done = run(experts, self.recipe, model, source, options, keeper=keeper)
            merged = done.merged[self.recipe.mu]
            told = report(merged, experts, self.recipe, done.measured, done.seconds)
            write_merge(out, merged, told, module.pretrained, statistics=done.statistics)
        config = Path(trainer.default_root_dir) / "config.yaml"
        if config.is_file():
            shutil.copyfile(config, out / "config.yaml")
        print(f"{table(merged)}\n\nadapter: {out / WEIGHTS_NAME}\nreport:  {out / REPORT_NAME}")

    def _prompts(self, trainer: Trainer, names: list[str]) -> tuple[str | list[str], CalibrationOptions]:
        """The source of the calibration's prompts, and the options with the categories that are used."""
        data = datamodule_of(trainer)
        source = self.calibration.prompts or (data.train if isinstance(data, WithTrain) else None)
        if source is None:
            raise UserError(
                "`MergeExperts.calibration.prompts` is not given, and the data does not name training shards: "
                f"{self.recipe.method} needs one of them; or use a `method` without prompts: {NEED_NOTHING}"
            )
        options = self.calibration
        if not self.recipe.clean_inputs and options.categories is None and has_categories(source):
            options = replace(options, categories=names)
        return source, options


def _backbone(trainer: Trainer, module: PreferenceModule) -> Backbone:
    """The base model on the device of the training: Lightning has moved it to the CPU."""
    backbone = module.backbone  # with its adapter switched off
    # The strategy of the fit may hold it sharded or rounded.
    if isinstance(trainer.strategy, DeepSpeedStrategy | ModelParallelStrategy):
        backbone = load_backbone(module.pretrained)
    return backbone.to(trainer.strategy.root_device)
