"""Weights from which a new run can start: an exported adapter or pipeline, or a checkpoint of any strategy."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_safety.adapters.lora import LoRA
from lit_safety.core.errors import UserError
from lit_safety.core.weights import DIFFUSERS, need_weights, open_safetensors

if TYPE_CHECKING:
    from lit_safety.adapters.layer_names import AdaptableLayers

KEY = "model.init_args.start_from"


def is_checkpoint(path: Path) -> bool:
    """Whether ``path`` is a checkpoint (a file, or a folder of DeepSpeed) and not an export."""
    return path.suffix == ".ckpt" or (path / "checkpoint").is_dir()


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of any strategy, whose `state_dict` holds the trained weights, whole and in fp32.

    Raises:
        UserError: it is missing or damaged.
    """
    if path.is_dir():
        return _read_deepspeed(path)
    return read_file(path)


def read_file(path: Path) -> dict[str, Any]:
    """The content of a checkpoint file. Tensors are read from the disk when they are used.

    Raises:
        UserError: it is damaged, or was not written by a trainer.
    """
    try:
        found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, UnpicklingError) as error:
        raise UserError(f"{path} is not a readable checkpoint: {str(error).strip().splitlines()[0]}") from error
    if not isinstance(found, dict) or "state_dict" not in found:
        raise UserError(f"{path} is not a checkpoint of this trainer: state_dict is missing")
    return found


def _read_deepspeed(path: Path) -> dict[str, Any]:
    if not (path / "checkpoint").is_dir():
        raise UserError(f"`{KEY}` {path} is a folder, but not a checkpoint of DeepSpeed")
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    try:
        weights = get_fp32_state_dict_from_zero_checkpoint(str(path), tag="checkpoint", exclude_frozen_parameters=True)
    except (OSError, RuntimeError, ValueError, KeyError, AssertionError) as error:
        raise UserError(f"`{KEY}` {path} is not a readable checkpoint of DeepSpeed: {error}") from error
    return {"state_dict": {name: weights[name] for name in sorted(weights)}}


def read_adapter(path: Path, lora: LoRA, adapter: str, known: AdaptableLayers | None = None) -> dict[str, Tensor]:
    """A LoRA file's weights by the names that PEFT gives the denoiser's parameters, `{layer}.lora_A.{adapter}.weight`.

    Args:
        path: the folder or file.
        lora: the LoRA of this run.
        adapter: PEFT's name of it.
        known: the layers of the denoiser.

    Raises:
        UserError: it is missing or damaged, holds a layer that the denoiser lacks, or its alpha differs from that of
            ``lora``.
    """
    from lit_safety.adapters.lora_file import read_lora
    from lit_safety.adapters.low_rank import factors_of

    try:
        layers = read_lora(path, known)
    except UserError as error:
        raise UserError(f"`{KEY}` {error}") from error
    found = {}
    for name, layer in layers.items():
        if abs(layer.scale - lora.alpha / lora.rank) > 1e-6 and layer.rank == lora.rank:
            raise UserError(
                f"`{KEY}` {path}: its alpha / rank is {layer.scale:g}, but that of `lora` is "
                f"{lora.alpha / lora.rank:g}: set lora.alpha to the file's"
            )
        inner = name.split(".", 1)[1]
        for side, factor in zip("AB", factors_of(layer), strict=True):
            found[f"{inner}.lora_{side}.{adapter}.weight"] = factor
    return found


def read_experts(
    path: Path, lora: LoRA, adapter: str, names: Sequence[str], known: AdaptableLayers | None = None
) -> dict[str, dict[str, Tensor]]:
    """Each expert's weights by name, from a folder with a LoRA folder for each, or from a checkpoint.

    Raises:
        UserError: one is missing, or they are in a checkpoint of DeepSpeed, which holds only one expert.
    """
    if is_checkpoint(path):
        held = read_checkpoint(path)
        if "experts" not in held:
            raise UserError(
                f"`{KEY}` {path}: experts are read from exports, or from files of one process, DDP or FSDP2"
            )
        found = {name: dict(one["weights"]) for name, one in held["experts"]["resting"].items()}
        own = {name.removeprefix("backbone.denoiser."): value for name, value in held["state_dict"].items()}
        found[held["experts"]["active"]] = own
    else:
        found = {name: read_adapter(path / name, lora, adapter, known) for name in names if (path / name).is_dir()}
    if missing := sorted(set(names) - set(found)):
        raise UserError(f"`{KEY}` {path} lacks the expert {', '.join(missing)}; it has {', '.join(found) or 'none'}")
    return {name: found[name] for name in names}


def read_denoiser(path: Path, name: str) -> dict[str, Tensor]:
    """All weights of the network ``name`` (such as unet) of a pipeline folder.

    Raises:
        UserError: there are none, or they are damaged.
    """
    if not (path / name).is_dir():
        raise UserError(f"`{KEY}` {path} is not an adapter, a pipeline with {name}, or a checkpoint")
    found: dict[str, Tensor] = {}
    for file in need_weights(path / name, DIFFUSERS).names:
        with open_safetensors(path / name / file) as handle:
            found |= {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    return found


@torch.no_grad()
def fill(parameters: dict[str, nn.Parameter], weights: dict[str, Tensor]) -> None:
    """Copy ``weights`` into the parameters of the same names. The caller has compared names and shapes."""
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])


# Check that the folder of a checkpoint of FSDP2 or DeepSpeed holds all its parts, and no code of other people.
#
# Both are read by pickle, which can run code. So the names in the pickles are compared with those that the two
# libraries write, before the libraries read them.


#: Packages whose plain classes the two formats hold.
_FSDP2 = ("torch.distributed.checkpoint.", "torch.serialization", "torch._utils", "torch.storage")
_PLAIN = {
    ("builtins", "set"),
    ("builtins", "frozenset"),
    ("builtins", "complex"),
    ("collections", "OrderedDict"),
    ("collections", "defaultdict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib._local", "PosixPath"),
    ("torch", "Size"),
    ("torch", "device"),
}
_UNREADABLE = (OSError, EOFError, ValueError, RuntimeError, UnpicklingError, AttributeError, ImportError, KeyError)


def missing_parts(folder: Path) -> str | None:
    """What is missing in a folder, or must not be there; None: nothing."""
    try:
        if (folder / ".metadata").exists():
            return _fsdp2(folder)
        if (folder / "checkpoint").is_dir():
            return _deepspeed(folder / "checkpoint")
    except _UNREADABLE as error:
        return f"cannot be read: {' '.join(str(error).split())[:200] or type(error).__name__}"
    return "is not a checkpoint of FSDP2 (.metadata) or DeepSpeed (checkpoint/)"


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = f"{module}." if module == "torch.distributed.checkpoint" else module
        found: Any = None
        if (module, name) in _PLAIN or known.startswith(_FSDP2):
            found = super().find_class(module, name)
        elif module == "torch" and isinstance(getattr(torch, name, None), torch.dtype | torch.layout):
            return getattr(torch, name)
        # A class is only created and filled; a function would be called with arguments from the file.
        if isinstance(found, type) or (module, name) == ("torch.serialization", "_get_layout"):
            return found
        raise UnpicklingError(f"it names {module}.{name}, which is not part of a checkpoint")


def _fsdp2(folder: Path) -> str | None:
    with open(folder / ".metadata", "rb") as file:
        metadata = _Restricted(file).load()
    storage: dict[Any, Any] = getattr(metadata, "storage_data", None) or {}
    needed: dict[str, int] = {}
    for one in storage.values():
        needed[one.relative_path] = max(needed.get(one.relative_path, 0), one.offset + one.length)
    for name, size in needed.items():
        path = folder / name
        if not path.is_file():
            return f"lacks {name}"
        if path.stat().st_size < size:
            return f"{name} has {path.stat().st_size} bytes but should have {size}"
    meta = folder / "meta.pt"
    if not meta.is_file():
        return "lacks meta.pt"
    torch.load(meta, map_location="cpu", mmap=True, weights_only=True)
    return None


def _deepspeed(folder: Path) -> str | None:
    parts = sorted(folder.glob("*_states.pt"))
    if not any(part.name.endswith("model_states.pt") for part in parts):
        return "lacks its model_states.pt"
    for part in parts:
        foreign = [name for name in torch.serialization.get_unsafe_globals_in_checkpoint(part) if not _is_class(name)]
        if foreign:
            return f"{part.name} names {foreign[0]}, which is not part of a checkpoint"
    optimizers = [part.name for part in parts if part.name.endswith("optim_states.pt")]
    ranks = {int(name.split("zero_pp_rank_")[1].split("_")[0]) for name in optimizers if "zero_pp_rank_" in name}
    world = max(_world(parts), max(ranks, default=0) + 1)
    if missing := sorted(set(range(world)) - ranks):
        return f"lacks the optimizer's states of rank {missing[0]}"
    return None


def _is_class(name: str) -> bool:
    """Whether a pickle names a class of DeepSpeed or Lightning, which is only created and filled, and not a
    function."""
    module, _, last = name.rpartition(".")
    return name.startswith(("deepspeed.", "lightning.")) and isinstance(
        getattr(import_module(module), last, None), type
    )


def _world(parts: list[Path]) -> int:
    """How many ranks wrote it, by its first part; 0: not stated."""
    first = next(part for part in parts if part.name.endswith("model_states.pt"))
    # What it names was looked at before.
    held = torch.load(first, map_location="cpu", mmap=True, weights_only=False)
    found = held.get("dp_world_size", 0) if isinstance(held, dict) else 0
    return found if isinstance(found, int) else 0
