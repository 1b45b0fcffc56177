"""Images of a run: fixed prompts while it trains, and the drawings of `predict` written to a folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, Callback

from lit_safety.core.errors import UserError
from lit_safety.modules.preference import PreferenceModule
from lit_safety.modules.strategies import weights_are_sharded

LEAST = 128
"""Tiny images are enlarged to this many pixels."""


class DrawSamples(Callback):
    """At every validation, draws the same prompts from the same seeds. This shows what preference accuracy cannot show.

    The images go to `samples/step-000050.png` in the run's folder, and to the logger if it accepts images.

    Args:
        prompts: a few prompts to draw, harmful and clean.
        seed: the first prompt's seed; the others get the next numbers.
        blur: blur every image; null: blur unless the model is of an embedded world, whose images are harmless.
    """

    def __init__(self, prompts: Sequence[str], seed: int = 0, blur: bool | None = None) -> None:
        if not prompts:
            raise UserError("`DrawSamples.prompts` is empty: name some prompts, or remove the callback")
        self.prompts = list(prompts)
        self.seed = seed
        self.blur = blur

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the parts for drawing can be loaded: a run from a cache may not have loaded them."""
        preference_module(pl_module).backbone.check_files()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not (trainer.is_global_zero or weights_are_sharded(trainer)):
            return
        from lit_safety.report.sheet import plain_sheet, veiled

        seeds = [self.seed + i for i in range(len(self.prompts))]
        rows = preference_module(pl_module).draw_rows(self.prompts, seeds)
        if not trainer.is_global_zero:
            return
        if self._blurs(preference_module(pl_module).pretrained):
            rows = [[veiled(one) for one in row] for row in rows]
        sheet = plain_sheet(rows, zoom=max(1, LEAST // rows[0][0].width))
        folder = Path(trainer.default_root_dir) / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        sheet.save(folder / f"step-{trainer.global_step:06d}.png")
        for logger in trainer.loggers:
            add_image = getattr(getattr(logger, "experiment", None), "add_image", None)
            if callable(add_image):
                add_image("samples", np.asarray(sheet), trainer.global_step, dataformats="HWC")

    def _blurs(self, pretrained: str) -> bool:
        if self.blur is None:
            from lit_safety.drawing.pipelines import local_pipeline
            from lit_safety.drawing.worlds import of_a_world

            self.blur = not of_a_world(local_pipeline(pretrained))
        return self.blur


class WriteDrawings(BasePredictionWriter):
    """Writes what `predict` draws to `drawings/<key>.png`, with `drawings/prompts-0.jsonl` (one a rank) next to them.

    Args:
        folder: the output folder; null: `drawings` in the run's folder.
    """

    def __init__(self, folder: str | None = None) -> None:
        super().__init__(write_interval="batch")
        self.folder = folder

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # If another program started the ranks, only rank 0 knows the run's folder.
        root = trainer.strategy.broadcast(trainer.default_root_dir)
        self._target = Path(self.folder or Path(root) / "drawings")

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        folder = self._target
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"prompts-{trainer.global_rank}.jsonl").open("a", encoding="utf-8") as notes:
            for key, prompt, seed, image in zip(batch.keys, batch.prompts, batch.seeds, prediction, strict=True):
                name = f"{key.replace('/', '_')}.png"
                image.save(folder / name)
                notes.write(json.dumps({"file": name, "prompt": prompt, "seed": seed}, ensure_ascii=False) + "\n")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            print(f"drawings: {self._target}")


def preference_module(module: LightningModule) -> PreferenceModule:
    """``module``, checked to be a PreferenceModule.

    Raises:
        UserError: if it is something else.
    """
    if not isinstance(module, PreferenceModule):
        raise UserError(
            f"{type(module).__name__} is not a PreferenceModule: remove the drawing callbacks from its YAML"
        )
    return module
