"""Pairs whose order is turned round."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lit_safety.data.batch import PairBatch
from lit_safety.errors import UserError


def turned_round(batch: PairBatch, swap: Tensor) -> PairBatch:
    """`batch` with chosen and rejected exchanged where `swap`, bool (B,), is true: images, latents, labels, crops.

    Seeds stay, so timestep, noise and every other choice of a pair are the same in either order.

    Raises:
        UserError: the batch holds the reference's predictions, which a cache has of the chosen images alone.
    """
    if batch.reference_prediction is not None:
        raise UserError(
            "pairs are turned round, and the reference cache holds predictions of the chosen image alone: set "
            "objective.init_args.anchor_weight to 0, or data.init_args.use_reference to false"
        )

    def columns(values: Tensor) -> Tensor:
        return torch.where(swap.view(-1, *[1] * (values.ndim - 1)), values.flip(1), values)

    changed: dict[str, Any] = {name: columns(getattr(batch, name)) for name in ("harmful", "cost", "score")}
    for name in ("latents", "crops", "reference"):
        if (values := getattr(batch, name)) is not None:
            changed[name] = columns(values)
    if batch.chosen is not None and batch.rejected is not None:
        where = swap.view(-1, 1, 1, 1)
        changed["chosen"] = torch.where(where, batch.rejected, batch.chosen)
        changed["rejected"] = torch.where(where, batch.chosen, batch.rejected)
    return replace(batch, **changed)
