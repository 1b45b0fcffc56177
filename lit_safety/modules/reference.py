"""The reference of a step: run beside the policy, or read out of the pairs' reference cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lit_safety.backbones import Backbone
from lit_safety.data.batch import PairBatch
from lit_safety.errors import UserError
from lit_safety.objectives import prediction_error


@dataclass
class ReferencePass:
    """What a step needs of the reference, without gradient."""

    chosen: Tensor
    """Its errors on the chosen images (B,)."""
    rejected: Tensor
    """Its errors on the rejected images (B,)."""
    prediction: Tensor | None
    """Its predictions on the chosen images (B, C, h, w); out of a cache zeros for harmful prompts, or None."""


def cached_pass(batch: PairBatch, dropped: Sequence[bool]) -> ReferencePass:
    """What the batch's cache holds of the reference, for prompts that are dropped or not.

    Raises:
        UserError: a prompt is dropped and the cache holds no errors without the prompt.
    """
    errors, predictions = batch.reference, batch.reference_prediction
    assert errors is not None
    if not any(dropped):
        prediction = None if predictions is None else predictions[:, 0]
        return ReferencePass(errors[:, 0, 0], errors[:, 1, 0], prediction)
    if errors.shape[2] < 2:
        raise UserError(
            f"sample {batch.keys[list(dropped).index(True)]}: its prompt is dropped, and the reference cache holds "
            "no errors without the prompt: make it anew with `shards precompute --reference_dropout true`, or set "
            "every dropout of a prompt to 0"
        )
    without = torch.tensor(dropped).to(errors.device, non_blocking=True)
    found = torch.where(without.view(-1, 1), errors[:, :, 1], errors[:, :, 0])
    prediction = None
    if predictions is not None:
        prediction = torch.where(without.view(-1, 1, 1, 1), predictions[:, 1], predictions[:, 0])
    return ReferencePass(found[:, 0], found[:, 1], prediction)


class FrozenReference:
    """The reference of a run that has not begun, for `shards precompute`: the very arithmetic of a training step.

    Args:
        pretrained: the pipeline.
        backbone: of it, with its denoiser.
        precision: in the words of `trainer.precision`.
    """

    def __init__(self, pretrained: str, backbone: Backbone, precision: str) -> None:
        from lit_safety.modules.preference import PreferenceModule
        from lit_safety.objectives import DiffusionDPO

        self.module = PreferenceModule(pretrained, DiffusionDPO()).eval()
        self.module.backbone = backbone
        self.module.to(backbone.device)
        self.half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)

    @torch.no_grad()
    def __call__(self, batch: PairBatch, without_prompt: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Timesteps (B,), errors of chosen and rejected (B, 2), predictions on the chosen images (B, C, h, w)."""
        device = self.module.backbone.device
        if without_prompt:
            assert batch.empty is not None
            empty = {name: row.expand(len(batch), *row.shape[1:]) for name, row in batch.empty.items()}
            batch = replace(batch, conditioning=empty)
        with torch.autocast(device.type, self.half, enabled=self.half is not None):
            noisy, timesteps, target, conditioning = self.module.noised(batch.to(device))
            prediction = self.module.backbone.predict(noisy, timesteps, conditioning)
        chosen, rejected = prediction_error(prediction, target).chunk(2)
        size = len(batch)
        return timesteps[:size], torch.stack([chosen, rejected], dim=1), prediction[:size]
