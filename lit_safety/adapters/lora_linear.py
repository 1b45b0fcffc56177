"""Our forward of PEFT's LoRA linear layer: fewer kernels and less memory traffic, on PEFT's own parameters.

PEFT computes base(x) + B(A(x)) * s in steps that a GPU waits for: under autocast the input is cast for the base layer
and again for A, the update is written, multiplied by s and added to what the base layer wrote, and in the backward pass
two gradients of the input are cast and added. Here the input is cast once, the update is added by the matrix product
that computes it, in both directions, and s is a factor of a product (nothing at all where it is 1).

Casts of A and B are made in each forward pass and kept for its backward pass. They are not kept longer: a cast that
outlives its pass is wrong once a strategy or an expert's turn writes into the weights, and what was cast without
gradient must not serve a pass with gradient, which is what autocast's own cache is known for.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import layer as peft_layer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class LoRALinear(peft_layer.Linear):
    """A LoRA linear layer of PEFT's that computes by itself where it is simple, and by PEFT's forward elsewhere.

    Simple is: one adapter is active, without dropout, bias or a variant such as DoRA, nothing is merged, and the base
    layer is a plain linear layer with frozen weights of floating-point numbers that are whole on this rank.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._disable_adapters and not self.merged_adapters and not args and not kwargs:
            return self.base_layer(x)  # the reference
        adapter = None if args or kwargs else self._simple()
        if adapter is None:
            return super().forward(x, *args, **kwargs)
        base, a, b = self.base_layer, self.lora_A[adapter].weight, self.lora_B[adapter].weight
        kind = _computes_in(x)
        if kind is None:
            if not x.dtype == base.weight.dtype == a.dtype == b.dtype:
                return super().forward(x, *args, **kwargs)
            kind = x.dtype
        # Compiled code has bits of its own, and the compiler takes no tensor twice.
        twice = x if _sums_apart(x) and kind == torch.float32 and not torch.compiler.is_compiling() else None
        found: Tensor = _LowRankSum.apply(twice, x, base.weight, base.bias, a, b, float(self.scaling[adapter]), kind)
        return found

    def _simple(self) -> str | None:
        """The one adapter to compute with, or None where PEFT must."""
        active = self.active_adapters
        if len(active) != 1 or self._disable_adapters or self.merged_adapters or self.fan_in_fan_out:
            return None
        name: str = active[0]
        if name not in self.lora_A or name in self.lora_variant or self.lora_bias.get(name):
            return None
        dropout = self.lora_dropout[name]
        if not isinstance(dropout, nn.Identity) and self.training:
            return None
        layers = (self.base_layer, self.lora_A[name], self.lora_B[name])
        return name if all(map(_plain, layers)) and not self.base_layer.weight.requires_grad else None


def use_own_forward(network: nn.Module) -> None:
    """Let the LoRA linear layers of ``network`` compute by `LoRALinear`; their parameters and names stay."""
    for module in network.modules():
        if type(module) is peft_layer.Linear:
            module.__class__ = LoRALinear


def _plain(layer: nn.Module) -> bool:
    """Whether a layer is its weight and no more: no subclass or hook, nothing quantised or cut over ranks."""
    if type(layer) is not nn.Linear or layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__:
        return False
    if layer._backward_hooks or layer._backward_pre_hooks:
        return False
    weight, bias = layer.weight, layer.bias
    if hasattr(weight, "__tensor_flatten__") or hasattr(weight, "ds_id"):  # torchao and DTensor; ZeRO 3
        return False
    return weight.is_floating_point() and (bias is None or not bias.requires_grad)


def _computes_in(x: Tensor) -> torch.dtype | None:
    """What autocast computes in where ``x`` lies; None: there is none, and numbers stay as they are."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return None


class _LowRankSum(torch.autograd.Function):
    """x W' + bias + s (x A') B', computed in one precision, with gradients for x, A and B.

    x may be given twice, once for each product that it is in: autograd then adds up the two gradients, in the order in
    which it does for PEFT's layers.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_of_a: Tensor | None,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        kind: torch.dtype,
    ) -> Tensor:
        x_, weight_, a_, b_ = x.to(kind), weight.to(kind), a.to(kind), b.to(kind)
        found = F.linear(x_, weight_, None if bias is None else bias.to(kind))
        low = F.linear(x_, a_)
        if _sums_apart(found) or not found.is_contiguous():
            update = F.linear(low, b_)
            found.add_(update if scale == 1 else update.mul_(scale))
        else:
            rows = found.view(-1, found.shape[-1])
            rows.addmm_(low.reshape(len(rows), -1), b_.t(), alpha=scale)
        ctx.save_for_backward(x_, low, weight_, a_, b_)
        ctx.scale, ctx.kinds = scale, (x.dtype, a.dtype, b.dtype)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, low, weight, a, b = ctx.saved_tensors
        twice, for_x, _, _, for_a, for_b, _, _ = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x_of_a = grad_x = grad_a = grad_b = None
        if for_b:
            grad_b = _product(rows.t(), low.reshape(len(rows), -1), ctx.scale).to(ctx.kinds[2])
        if for_a or for_x:
            grad_low = _product(rows, b, ctx.scale)
        if for_a:
            grad_a = (grad_low.t() @ x.reshape(len(rows), -1)).to(ctx.kinds[1])
        if for_x:
            grad_x = rows @ weight
            if twice:
                grad_x_of_a = (grad_low @ a).view(x.shape)
            else:
                grad_x.addmm_(grad_low, a)
            grad_x = grad_x.view(x.shape).to(ctx.kinds[0])
        return grad_x_of_a, grad_x, None, None, grad_a, grad_b, None, None


def _sums_apart(values: Tensor) -> bool:
    """Whether a sum is a step of its own: in fp32 on a CPU, where it costs little and gives the bits of PEFT's forward,
    so that what was trained before can be trained again."""
    return values.dtype == torch.float32 and values.device.type == "cpu"


def _product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale * left @ right, in one product."""
    if scale == 1:
        return left @ right
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scale)
