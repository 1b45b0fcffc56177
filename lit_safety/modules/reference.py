"""The reference of a step: it runs together with the policy, or is read from the pairs' reference cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_safety.core.errors import UserError
from lit_safety.data.reading.batch import PairBatch


@dataclass
class ReferencePass:
    """What a step needs from the reference, without gradient."""

    chosen: Tensor
    """Its errors on the chosen images (B,)."""
    rejected: Tensor
    """Its errors on the rejected images (B,)."""
    prediction: Tensor | None
    """Its predictions on the chosen images (B, C, h, w). From a cache: zeros for harmful prompts, or None."""


def cached_pass(batch: PairBatch, dropped: Sequence[bool]) -> ReferencePass:
    """The reference's results from the batch's cache; ``dropped`` says which prompts are dropped.

    Raises:
        UserError: a prompt is dropped, but the cache holds no errors without the prompt.
    """
    errors, predictions = batch.reference, batch.reference_prediction
    assert errors is not None
    if not any(dropped):
        prediction = None if predictions is None else predictions[:, 0]
        return ReferencePass(errors[:, 0, 0], errors[:, 1, 0], prediction)
    if errors.shape[2] < 2:
        raise UserError(
            f"sample {batch.keys[list(dropped).index(True)]}: its prompt is dropped, but the reference cache holds no "
            "errors without the prompt: make it again with `shards precompute --reference_dropout true`, or set every "
            "dropout of a prompt to 0"
        )
    without = torch.tensor(dropped).to(errors.device, non_blocking=True)
    found = torch.where(without.view(-1, 1), errors[:, :, 1], errors[:, :, 0])
    prediction = None
    if predictions is not None:
        prediction = torch.where(without.view(-1, 1, 1, 1), predictions[:, 1], predictions[:, 0])
    return ReferencePass(found[:, 0], found[:, 1], prediction)
