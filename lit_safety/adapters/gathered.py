"""Parameters that FSDP2 or DeepSpeed's ZeRO keeps sharded or rounded, as whole tensors and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole ``tensor``, detached: gathered if it is sharded (all ranks must call it), else itself."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


def like(tensor: Tensor, example: Tensor) -> Tensor:
    """This rank's shard of the whole ``tensor`` if ``example`` is sharded. Every rank has the same ``tensor``."""
    if not isinstance(example, DTensor) or isinstance(tensor, DTensor) or tensor.shape != example.shape:
        return tensor
    here = tensor.to(example.device)
    # Ranks do not communicate: each cuts its own shard.
    return distribute_tensor(here, example.device_mesh, example.placements, src_data_rank=None)


@contextmanager
def assembled(
    network: nn.Module, parameters: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor]
) -> Iterator[None]:
    """Inside, sharded ``parameters`` are whole tensors from ``weights``, and ``network``'s modules have their own class
    names again, so that it is saved correctly. Do not compute with it.

    Args:
        network: the module that contains the parameters.
        parameters: any of them, by any names.
        weights: whole tensors by the same names.
    """
    from torch.distributed.fsdp import FSDPModule

    wanted = {id(p): weights[name] for name, p in parameters.items() if isinstance(p, DTensor)}
    swapped: list[tuple[Any, str, nn.Parameter]] = []
    renamed: list[tuple[Any, type]] = []
    try:
        for module in network.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) in wanted:
                    swapped.append((module, name, parameter))
            if isinstance(module, FSDPModule):  # FSDP2 makes this class from FSDPModule and the network's own
                renamed.append((module, type(module)))
        for module, name, parameter in swapped:
            module._parameters[name] = nn.Parameter(wanted[id(parameter)], requires_grad=parameter.requires_grad)
        for module, made in renamed:
            module.__class__ = next(base for base in made.__bases__ if base is not FSDPModule)
        yield
    finally:
        for module, name, parameter in swapped:
            module._parameters[name] = parameter
        for module, made in renamed:
            module.__class__ = made


# The trained parameters as whole fp32 tensors, under both strategies.


def gathered(parameters: Iterable[nn.Parameter], write: bool = False) -> AbstractContextManager[None]:
    """Inside, parameters that ZeRO 3 has partitioned are whole. Others do not change. All ranks must enter.

    Args:
        parameters: any.
        write: what rank 0 writes into them inside is kept.
    """
    split = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not split:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(split, modifier_rank=0 if write else None)


def master_weights(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Copies of the whole fp32 weights that the optimizer updates. All ranks must call it.

    ZeRO keeps its own fp32 weights, while the network's may be rounded to half precision. FSDP2's are sharded. For
    other parameters these are the weights themselves.
    """
    found = {}
    for name, parameter in parameters.items():
        master = None
        if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
            from deepspeed.utils import safe_get_full_fp32_param

            with _where_ranks_meet(parameter):
                master = safe_get_full_fp32_param(parameter)
        found[name] = whole(parameter if master is None else master).clone()
    return found


@contextmanager
def _where_ranks_meet(parameter: nn.Parameter) -> Iterator[None]:
    """Inside, ``parameter`` is on DeepSpeed's device, where it gathers (by NCCL, into a buffer on the same device). At
    the end of a fit Lightning has already moved the module to the CPU."""
    from deepspeed.accelerator import get_accelerator

    kept = parameter.data
    try:
        parameter.data = kept.to(get_accelerator().current_device_name())
        yield
    finally:
        parameter.data = kept


@contextmanager
def replaced(
    network: nn.Module, parameters: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor]
) -> Iterator[None]:
    """Inside, ``parameters`` of ``network`` are ``weights``, in their precision, also under ZeRO or FSDP2. Not for
    training."""
    kept = {name: parameter.data for name, parameter in parameters.items() if not isinstance(parameter, DTensor)}
    try:
        for name in kept:
            parameters[name].data = weights[name].to(parameters[name].device)
        with assembled(network, parameters, weights):
            yield
    finally:
        for name, values in kept.items():
            parameters[name].data = values


@contextmanager
def unpartitioned() -> Iterator[None]:
    """Inside, new modules are whole. ZeRO 3 would partition them at once; its engine does it later."""
    from deepspeed.runtime.zero.partition_parameters import restore_init_context, shutdown_init_context

    shutdown_init_context()
    try:
        yield
    finally:
        restore_init_context()
