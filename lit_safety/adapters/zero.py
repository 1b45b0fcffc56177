"""Parameters that DeepSpeed's ZeRO keeps in pieces or rounded, as whole fp32 tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import Tensor, nn


def gathered(parameters: Iterable[nn.Parameter], write: bool = False) -> AbstractContextManager[None]:
    """Within, parameters that ZeRO 3 has partitioned are whole; nothing happens to others. All ranks must enter.

    Args:
        parameters: any.
        write: what rank 0 writes into them within is kept.
    """
    split = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not split:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(split, modifier_rank=0 if write else None)


def master_weights(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The fp32 weights that are stepped on, whole, as copies. All ranks must call it.

    ZeRO of every stage keeps its own; the network's may be rounded to half precision. Of parameters that no ZeRO
    optimizer has, the weights themselves.
    """
    found = {}
    for name, parameter in parameters.items():
        whole = None
        if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
            from deepspeed.utils import safe_get_full_fp32_param

            whole = safe_get_full_fp32_param(parameter)
        found[name] = (parameter if whole is None else whole).detach().clone()
    return found


@contextmanager
def replaced(parameters: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Within, the parameters are ``weights``, in their precision, whatever ZeRO has made of them; not to train with."""
    kept = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = weights[name].to(parameter.device)
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = kept[name]


@contextmanager
def unpartitioned() -> Iterator[None]:
    """Within, modules are made whole where ZeRO 3 would partition them as they are made; its engine does it later."""
    from deepspeed.runtime.zero.partition_parameters import restore_init_context, shutdown_init_context

    shutdown_init_context()
    try:
        yield
    finally:
        restore_init_context()
