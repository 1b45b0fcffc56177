"""Whether the folder of a checkpoint, as FSDP2 and DeepSpeed write it, holds all its parts, and no foreign program.

Both are read by pickle, which runs what a file says. So what the pickles name is compared with what the two libraries
write, before those read it.
"""

from __future__ import annotations

import pickle
from importlib import import_module
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

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
    """What a folder lacks, or holds and should not; None: nothing."""
    try:
        if (folder / ".metadata").exists():
            return _fsdp2(folder)
        if (folder / "checkpoint").is_dir():
            return _deepspeed(folder / "checkpoint")
    except _UNREADABLE as error:
        return f"cannot be read: {' '.join(str(error).split())[:200] or type(error).__name__}"
    return "is no checkpoint of FSDP2 (.metadata) or DeepSpeed (checkpoint/)"


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = f"{module}." if module == "torch.distributed.checkpoint" else module
        found: Any = None
        if (module, name) in _PLAIN or known.startswith(_FSDP2):
            found = super().find_class(module, name)
        elif module == "torch" and isinstance(getattr(torch, name, None), torch.dtype | torch.layout):
            return getattr(torch, name)
        # A class is made and filled; a function would be called with whatever the file says.
        if isinstance(found, type) or (module, name) == ("torch.serialization", "_get_layout"):
            return found
        raise UnpicklingError(f"it names {module}.{name}, which is no part of a checkpoint")


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
            return f"{name} has {path.stat().st_size} bytes and should have {size}"
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
            return f"{part.name} names {foreign[0]}, which is no part of a checkpoint"
    optimizers = [part.name for part in parts if part.name.endswith("optim_states.pt")]
    ranks = {int(name.split("zero_pp_rank_")[1].split("_")[0]) for name in optimizers if "zero_pp_rank_" in name}
    world = max(_world(parts), max(ranks, default=0) + 1)
    if missing := sorted(set(range(world)) - ranks):
        return f"lacks the optimizer's states of rank {missing[0]}"
    return None


def _is_class(name: str) -> bool:
    """Whether a pickle names a class of DeepSpeed or Lightning, which is made and filled, and no function."""
    module, _, last = name.rpartition(".")
    return name.startswith(("deepspeed.", "lightning.")) and isinstance(
        getattr(import_module(module), last, None), type
    )


def _world(parts: list[Path]) -> int:
    """By how many ranks it was written, as its first part says; 0: it does not say."""
    first = next(part for part in parts if part.name.endswith("model_states.pt"))
    # What it names was looked at before.
    held = torch.load(first, map_location="cpu", mmap=True, weights_only=False)
    found = held.get("dp_world_size", 0) if isinstance(held, dict) else 0
    return found if isinstance(found, int) else 0
