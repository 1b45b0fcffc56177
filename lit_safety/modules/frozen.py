"""Training the whole denoiser instead of an adapter: then the reference is a frozen copy, not the same network."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import nn

from lit_safety.core.errors import UserError

if TYPE_CHECKING:
    from lit_safety.backbones.backbone import Backbone


class FrozenCopy:
    """A copy of the denoiser as it is now. It is not a submodule, so checkpoints and strategies do not see it.

    Args:
        backbone: its denoiser is copied, before training begins.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self._denoiser = copy.deepcopy(backbone.denoiser).requires_grad_(False).eval()

    @property
    def denoiser(self) -> nn.Module:
        return self._denoiser

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """A context in which the backbone computes with the copy."""
        modules: dict[str, Any] = self._backbone._modules
        trained = modules["denoiser"]
        modules["denoiser"] = self._denoiser.to(self._backbone.device)
        try:
            yield
        finally:
            modules["denoiser"] = trained


def make_all_trainable(denoiser: nn.Module) -> None:
    """Convert every weight to fp32 and let it get a gradient."""
    denoiser.float().requires_grad_(True)


def check_strategy(trainer: Trainer | None, reference_cached: bool = False) -> None:
    """Refuse a strategy that does not work with a full fine-tune.

    Args:
        trainer: the trainer whose strategy is checked.
        reference_cached: all pairs come with the reference's errors, so that no frozen copy is held.

    Raises:
        UserError: a frozen copy is used under ZeRO 3, which shards every network that exists when it begins.
    """
    strategy = None if trainer is None else trainer.strategy
    if isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3 and not reference_cached:
        raise UserError(
            "`model.init_args.policy: full` holds a frozen copy of the denoiser as its reference, and ZeRO 3 would "
            "shard it: use ZeRO 1 or 2, `policy: lora`, or shards with a reference cache for training and validation "
            "(`shards precompute --reference_draws`)"
        )
