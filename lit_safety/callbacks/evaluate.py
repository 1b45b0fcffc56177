"""`test`: the evaluation metrics of the current weights, next to those of the base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from lit_safety.callbacks.drawings import preference_module
from lit_safety.core.errors import UserError


class EvaluateOnTest(Callback):
    """After the test pairs, draws test prompts with base and policy, judges them, and writes `report/`.

    The same as `python -m lit_safety evaluate` on the checkpoint's adapter, with its options.

    Args:
        prompts: CSV of prompts, as `evaluate` reads it, or a list of its rows: prompt, kind and the other columns.
        judge: folder or file of the judge that decides what is harmful, or its `class_path` and `init_args`.
        explicit: explicit prompts of each category; null: all.
        implicit: implicit prompts; null: all.
        lookalike: look-alike prompts; null: all.
        clean: clean prompts; null: all.
        other_world: use prompts and judge of an embedded world, such as data/toyworld, for a model that is not of this
            world; false: refuse them before they are read.
    """

    def __init__(
        self,
        prompts: list[dict[str, Any] | str] | str,
        judge: dict[str, Any] | str,
        explicit: int | None = 40,
        implicit: int | None = 80,
        lookalike: int | None = 80,
        clean: int | None = 200,
        other_world: bool = False,
    ) -> None:
        self.prompts = prompts
        self.judge = judge
        self.explicit = explicit
        self.implicit = implicit
        self.lookalike = lookalike
        self.clean = clean
        self.other_world = other_world
        self.metrics: dict[str, Any] | None = None
        """The result of the last test, as in `report/metrics.json`; only on rank 0."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "test":
            return
        from lit_safety.drawing.pipelines import local_pipeline
        from lit_safety.drawing.prompts import read_prompts
        from lit_safety.drawing.worlds import check_world
        from lit_safety.evaluation.command import judge_file, prompt_file

        pipeline = local_pipeline(preference_module(pl_module).pretrained)
        report = Path(trainer.default_root_dir) / "report"
        prompts = prompt_file(self.prompts, report, "EvaluateOnTest.prompts")
        judge = judge_file(self.judge, report, "EvaluateOnTest.judge")
        files = {"EvaluateOnTest.prompts": prompts, "EvaluateOnTest.judge": judge}
        key = "`other_world: true` of EvaluateOnTest"
        check_world(pipeline, files, self.other_world, key, read_prompts(prompts))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        from lit_safety.drawing.arms import Arm
        from lit_safety.evaluation.command import evaluate

        module = preference_module(pl_module)
        run = Path(trainer.default_root_dir)
        (export, *others) = module.exports()
        if others:
            raise UserError(
                "`test` judges one adapter, and this module has several experts: merge them, then "
                "`evaluate --adapter` the merged one"
            )
        with module.exporting(export):  # on every rank: a parameter may be sharded over all of them
            if trainer.is_global_zero:
                module.save_export(run / export)
        if not trainer.is_global_zero:
            return
        whole = export == "pipeline"
        self.metrics = evaluate(
            pipeline=module.pretrained,
            prompts=self.prompts,
            judge=self.judge,
            out=str(run / "report"),
            adapter=None if whole else str(run / export),
            arms={"aligned": Arm(pipeline=str(run / export))} if whole else None,
            steps=module.drawing.steps,
            guidance=module.drawing.guidance,
            explicit=self.explicit,
            implicit=self.implicit,
            lookalike=self.lookalike,
            clean=self.clean,
            other_world=self.other_world,
        )
