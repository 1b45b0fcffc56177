"""Resolves conflicts between keeping a model's abilities and removing harm, by changing the gradient that keeps.

With fixed weights the two gradients are added, and where they conflict each undoes a part of the other. Here r is the
gradient of the terms that keep (an objective's anchor, anchor prompts), and g that of all other terms. The part of r
that points against g is removed:

    r' = r - (r . g / |g|^2) g   where r . g < 0           update with g + w r'

This is the gradient rectification of AEGIS (arXiv 2602.06771), which uses r' only where the two conflict and lets its
weight grow from 0 to 1. Both are options here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from torch import Tensor

from lit_safety.core.errors import UserError
from lit_safety.modules.step_parts import Retain

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

KEY = "model.init_args.retain"


class Retaining(Protocol):
    """What `ProjectRetain` needs from the module; `PreferenceModule` provides it."""

    @property
    def trainer(self) -> Trainer: ...

    @property
    def global_step(self) -> int: ...

    def trainable_parameters(self) -> list[tuple[str, torch.nn.Parameter]]: ...


def rectified(retain: Tensor, remove: Tensor, conflicts_only: bool = False) -> tuple[Tensor, Tensor]:
    """The changed gradient r' (N,), and the cosine () of r and g.

    Args:
        retain: r (N,).
        remove: g (N,).
        conflicts_only: r' is 0 if the two do not conflict.
    """
    dot, square = (retain * remove).sum(), remove.square().sum()
    conflict = dot < 0
    without = retain - dot / square.clamp(min=1e-30) * remove
    agreeing = torch.zeros_like(retain) if conflicts_only else retain
    cosine = dot / (square.sqrt() * retain.norm()).clamp(min=1e-30)
    return torch.where(conflict, without, agreeing), cosine


class ProjectRetain(Retain):
    """In each optimizer step, removes from the keeping gradient what points against the rest.

    It costs a second backward pass through the graph of the anchor terms.

    Args:
        grow: optimizer steps over which the weight of the keeping gradient grows from 0 to 1; 0: it is 1 from the
            start.
        conflicts_only: use the keeping gradient only if the two conflict, as AEGIS does.

    Raises:
        ValueError: ``grow`` is negative.
    """

    def __init__(self, grow: int = 0, conflicts_only: bool = False) -> None:
        if grow < 0:
            raise ValueError(f"grow must not be negative, got {grow}")
        self.grow, self.conflicts_only = grow, conflicts_only
        self._held: list[Tensor] | None = None

    def weight(self, optimizer_steps: int) -> float:
        """w after this number of optimizer steps."""
        return 1.0 if self.grow == 0 else min(1.0, optimizer_steps / self.grow)

    def check_settings(self, anchored: bool, selective: bool) -> None:
        """Check that an anchor term is set, and that the gradient is that of the whole batch.

        Raises:
            ValueError: one of these does not hold.
        """
        if not anchored:
            raise ValueError(
                "retain: no term holds the policy to the reference: set the objective's anchor_weight above 0, or "
                "anchors"
            )
        if selective:
            raise ValueError("retain and speed.selective: set one of them to null")

    def check(self, trainer: Trainer) -> None:
        """Check that the whole gradient of a step is available.

        Raises:
            UserError: the strategy spreads it over ranks, or the precision scales it.
        """
        if isinstance(trainer.strategy, DeepSpeedStrategy | ModelParallelStrategy):
            raise UserError(
                f"`{KEY}` needs whole gradients, which {type(trainer.strategy).__name__} spreads over the ranks: "
                "set it to null, or train by DDP"
            )
        if trainer.precision == "16-mixed":
            raise UserError(f"`{KEY}`: 16-mixed scales the loss: set `trainer.precision: bf16-mixed` or 32-true")

    def hold(self, module: Retaining, *terms: Tensor | None) -> None:
        """Add one micro-batch's keeping gradient: that of the sum of the means of ``terms``. Their graph is kept."""
        keeping = torch.stack([one.mean() for one in terms if one is not None]).sum()
        parameters = [p for _, p in module.trainable_parameters()]
        found = torch.autograd.grad(keeping, parameters, retain_graph=True, allow_unused=True)
        share = 1.0 / module.trainer.accumulate_grad_batches  # as Lightning weights a micro-batch's loss
        parts = [
            torch.zeros_like(p) if one is None else one.detach() * share
            for p, one in zip(parameters, found, strict=True)
        ]
        self._held = parts if self._held is None else [old + new for old, new in zip(self._held, parts, strict=True)]

    def project(self, module: Retaining) -> dict[str, Tensor]:
        """Change the gradient just before the optimizer step; returns what to log."""
        held, self._held = self._held, None
        parameters = [p for _, p in module.trainable_parameters()]
        if held is None:
            return {}
        retain = torch.cat([one.flatten().float() for one in held])
        if module.trainer.world_size > 1:
            reduced: Any = module.trainer.strategy.reduce(retain, reduce_op="mean")
            retain = reduced
        whole = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten().float() for p in parameters])
        kept, cosine = rectified(retain, whole - retain, self.conflicts_only)
        change = self.weight(module.global_step) * kept - retain
        for parameter, part in zip(parameters, change.split([p.numel() for p in parameters]), strict=True):
            part = part.view_as(parameter).to(parameter.dtype)
            parameter.grad = part if parameter.grad is None else parameter.grad + part
        return {"retain/cosine": cosine}
