"""What keeps a model against what removes harm from it: where their gradients point apart, the first gives way.

With fixed weights the two are added, and where they disagree each undoes a part of the other. Here the gradient r of
what keeps (an objective's anchor, anchor prompts) loses the part that points against the gradient g of all the rest:

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
    """What is asked of the module whose steps these are: `PreferenceModule`."""

    @property
    def trainer(self) -> Trainer: ...

    @property
    def global_step(self) -> int: ...

    def trainable_parameters(self) -> list[tuple[str, torch.nn.Parameter]]: ...


def rectified(retain: Tensor, remove: Tensor, conflicts_only: bool = False) -> tuple[Tensor, Tensor]:
    """The gradient r' (N,) of what keeps, and the cosine () of r and g.

    Args:
        retain: r (N,).
        remove: g (N,).
        conflicts_only: r' is 0 where the two agree.
    """
    dot, square = (retain * remove).sum(), remove.square().sum()
    conflict = dot < 0
    without = retain - dot / square.clamp(min=1e-30) * remove
    agreeing = torch.zeros_like(retain) if conflicts_only else retain
    cosine = dot / (square.sqrt() * retain.norm()).clamp(min=1e-30)
    return torch.where(conflict, without, agreeing), cosine


class ProjectRetain(Retain):
    """Takes out of what keeps what points against what removes, in each optimizer step.

    It costs a second backward pass through what the anchors are computed from.

    Args:
        grow: optimizer steps over which the weight of what keeps grows from 0 to 1; 0: it is 1 at once.
        conflicts_only: use what keeps only where the two conflict, as AEGIS does.

    Raises:
        ValueError: ``grow`` is negative.
    """

    def __init__(self, grow: int = 0, conflicts_only: bool = False) -> None:
        if grow < 0:
            raise ValueError(f"grow must not be negative, got {grow}")
        self.grow, self.conflicts_only = grow, conflicts_only
        self._held: list[Tensor] | None = None

    def weight(self, optimizer_steps: int) -> float:
        """w after so many optimizer steps."""
        return 1.0 if self.grow == 0 else min(1.0, optimizer_steps / self.grow)

    def check_settings(self, anchored: bool, selective: bool) -> None:
        """Whether there is something that keeps, and the whole batch's gradient.

        Raises:
            ValueError: there is not.
        """
        if not anchored:
            raise ValueError("retain: nothing keeps the policy: set the objective's anchor_weight above 0, or anchors")
        if selective:
            raise ValueError("retain and speed.selective: set one of them to null")

    def check(self, trainer: Trainer) -> None:
        """Whether the gradient of a step can be had whole.

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
        """Keep the gradient of what keeps, of one micro-batch: the sum of the means of ``terms``, whose graph stays."""
        keeping = torch.stack([one.mean() for one in terms if one is not None]).sum()
        parameters = [p for _, p in module.trainable_parameters()]
        found = torch.autograd.grad(keeping, parameters, retain_graph=True, allow_unused=True)
        share = 1.0 / module.trainer.accumulate_grad_batches  # as Lightning counts the loss of a micro-batch
        parts = [
            torch.zeros_like(p) if one is None else one.detach() * share
            for p, one in zip(parameters, found, strict=True)
        ]
        self._held = parts if self._held is None else [old + new for old, new in zip(self._held, parts, strict=True)]

    def project(self, module: Retaining) -> dict[str, Tensor]:
        """Change the gradient of the optimizer step that is about to be made; what to log."""
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
