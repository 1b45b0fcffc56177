"""The reference of a run before it begins."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lit_safety.backbones.backbone import Backbone
from lit_safety.data.reading.batch import PairBatch
from lit_safety.objectives.objective import prediction_error


class FrozenReference:
    """The reference of a run before it begins, for `shards precompute`: it computes exactly what a training step does.

    Args:
        pretrained: the pipeline folder or hub id.
        backbone: the pipeline's backbone, with its denoiser loaded.
        precision: a value of `trainer.precision`.
    """

    def __init__(self, pretrained: str, backbone: Backbone, precision: str) -> None:
        from lit_safety.modules.preference import PreferenceModule
        from lit_safety.objectives.dpo import DiffusionDPO

        self.module = PreferenceModule(pretrained, DiffusionDPO()).eval()
        self.module.backbone = backbone
        self.module.to(backbone.device)
        self.half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)

    @torch.no_grad()
    def __call__(self, batch: PairBatch, without_prompt: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Timesteps (B,), errors of chosen and rejected (B, 2), predictions on the chosen images (B, C, h, w).

        For groups: the errors of all images (B, K), and the predictions on the best images.
        """
        device = self.module.backbone.device
        if without_prompt:
            assert batch.empty is not None
            empty = {name: row.expand(len(batch), *row.shape[1:]) for name, row in batch.empty.items()}
            batch = replace(batch, conditioning=empty)
        with torch.autocast(device.type, self.half, enabled=self.half is not None):
            noisy, timesteps, target, conditioning = self.module.noised(batch.to(device))
            prediction = self.module.backbone.predict(noisy, timesteps, conditioning)
        if batch.groups is not None:
            from lit_safety.modules.groups import first_rows, of_best

            first = first_rows(batch.groups)
            errors = batch.groups.padded(prediction_error(prediction, target))
            return timesteps[first], errors, of_best(prediction, batch.groups)
        chosen, rejected = prediction_error(prediction, target).chunk(2)
        size = len(batch)
        return timesteps[:size], torch.stack([chosen, rejected], dim=1), prediction[:size]
