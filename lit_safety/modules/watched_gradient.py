"""The gradient of a step: its norm is logged, watched for what is not finite, and clipped by."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor
from torch.optim import Optimizer

from lit_safety.adapters.pieces import whole
from lit_safety.errors import UserError
from lit_safety.modules.monitoring import FiniteLossGuard


class WatchedGradient(LightningModule):
    """Lightning's hooks around an optimizer step. A run whose gradient is not finite stops when the step
    after the next begins, and before it writes a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.finite_loss = FiniteLossGuard()
        self._gradient_norm: Tensor | None = None

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self._gradient_norm = None
        if gradients:  # DeepSpeed keeps gradients to itself
            self._gradient_norm = norm = whole(torch.nn.utils.get_total_norm(gradients))
            self._watch_gradient(norm)
            self.log("grad_norm", norm)

    def _watch_gradient(self, norm: Tensor) -> None:
        # In fp16 a scaler leaves out steps that overflow, as the first ones do by design.
        if self._trainer is None or self._trainer.precision != "16-mixed":
            self.finite_loss.watch_gradient(norm)

    def optimizer_step(self, *arguments: Any, **named: Any) -> None:
        super().optimizer_step(*arguments, **named)
        engine: Any = self.trainer.model if isinstance(self.trainer.strategy, DeepSpeedStrategy) else None
        # DeepSpeed has it only now.
        if engine is not None and (found := engine.get_global_grad_norm()) is not None:
            norm = torch.as_tensor(found).to(self.device, torch.float32)
            self._watch_gradient(norm)
            self.log("grad_norm", norm)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        fused = getattr(optimizer, "_step_supports_amp_scaling", False)
        if fused and gradient_clip_val and self.trainer.precision == "16-mixed":
            raise UserError(
                "a fused optimizer undoes the scaling of 16-mixed within its step, after gradients were clipped: set "
                "`model.init_args.optimizer.init_args.fused: false`, `trainer.precision: bf16-mixed` or "
                "`trainer.gradient_clip_val: null`"
            )
        # The norm that was just logged is the one to clip by: computing it again costs a pass over all gradients.
        if self._gradient_norm is None or not gradient_clip_val or gradient_clip_algorithm not in (None, "norm"):
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, self._gradient_norm)

    def on_train_end(self) -> None:
        self.finite_loss.check()
