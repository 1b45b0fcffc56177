"""Parameters that FSDP2 keeps in pieces on all ranks (DTensors), as whole tensors and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """All of ``tensor``, detached: gathered where it is in pieces (all ranks must ask), else itself."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


def like(tensor: Tensor, example: Tensor) -> Tensor:
    """This rank's piece of the whole ``tensor`` where ``example`` is in pieces; every rank has the same ``tensor``."""
    if not isinstance(example, DTensor) or isinstance(tensor, DTensor) or tensor.shape != example.shape:
        return tensor
    here = tensor.to(example.device)
    # No rank sends anything: each cuts its own piece.
    return distribute_tensor(here, example.device_mesh, example.placements, src_data_rank=None)


@contextmanager
def assembled(
    network: nn.Module, parameters: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor]
) -> Iterator[None]:
    """Within, those of ``parameters`` that are in pieces are whole, as ``weights`` has them, and ``network``'s modules
    carry their own class names, so that it is saved as what it is. Not to compute with.

    Args:
        network: has the parameters somewhere below it.
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
            if isinstance(module, FSDPModule):  # a class made on the spot, of FSDPModule and the network's own
                renamed.append((module, type(module)))
        for module, name, parameter in swapped:
            module._parameters[name] = nn.Parameter(wanted[id(parameter)], requires_grad=parameter.requires_grad)
        for module, made in renamed:
            module.__class__ = made.__bases__[1]
        yield
    finally:
        for module, name, parameter in swapped:
            module._parameters[name] = parameter
        for module, made in renamed:
            module.__class__ = made
