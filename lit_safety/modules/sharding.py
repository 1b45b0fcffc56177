"""FSDP2: a network in pieces on all ranks, each block gathered while it computes.

What is trained and what is frozen is cut alike, block by block: a LoRA's own weights, gradients and moments are small,
so the memory is in the frozen base, and who needs FSDP needs that cut. One gather then brings a block's base and its
adapter together.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from lit_safety.adapters.user_adapter import PROJECTION


def under_fsdp(trainer: Trainer | None) -> bool:
    return trainer is not None and isinstance(trainer.strategy, ModelParallelStrategy)


def shard(network: nn.Module, mesh: Any) -> None:
    """Cut ``network`` into pieces: its blocks, each a group of its own, then what is left.

    Args:
        network: a denoiser, whole; its parameters are other objects afterwards.
        mesh: one-dimensional `DeviceMesh` of the ranks that hold the pieces.
    """
    anything: Any = network
    anything.to(memory_format=torch.contiguous_format)  # FSDP2 cuts contiguous weights only
    for block in blocks(network):
        fully_shard(block, mesh=mesh)
    outside = getattr(network, PROJECTION, None)
    if outside is not None:
        fully_shard(outside, mesh=mesh)
    # Not even the root stays whole after a forward pass: between steps every weight is what the optimizer has.
    fully_shard(network, mesh=mesh, reshard_after_forward=True)
    if outside is not None:
        _root_first(network, outside)


def blocks(network: nn.Module) -> list[nn.Module]:
    """The parts of a diffusers network that belong together on a device, the inner ones first."""
    names = {*(getattr(network, "_no_split_modules", None) or ()), *(getattr(network, "_repeated_blocks", None) or ())}
    found = [module for module in network.modules() if type(module).__name__ in names and module is not network]
    return found[::-1]


def _root_first(network: nn.Module, outside: nn.Module) -> None:
    """See to it that ``network`` is the root although ``outside``, a part of it, is called before it.

    FSDP2 takes for the root what computes first.
    """
    anything: Any = network
    anything.begin_forward = lambda: None
    register_fsdp_forward_method(network, "begin_forward")

    def begin(module: nn.Module, arguments: Any) -> None:
        handle.remove()
        anything.begin_forward()

    handle = outside.register_forward_pre_hook(begin, prepend=True)


def as_on_rank_0(parameters: Iterable[nn.Parameter], device: torch.device) -> None:
    """Give every rank rank 0's values, as DDP does: chance that one rank has used up alone must not part them."""
    for parameter in parameters:
        values = parameter.data.to(device).contiguous()
        torch.distributed.broadcast(values, src=0)
        parameter.data.copy_(values)


def drop_frozen(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """A hook on `state_dict`: frozen weights leave it before anybody gathers them."""
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            state.pop(prefix + name, None)
