"""Which process this is among several that share the work."""

from __future__ import annotations

import os

from lit_safety.errors import UserError


def this_rank(rank: int | None, world: int | None) -> tuple[int, int]:
    """Rank and number of ranks: as given, else as `torchrun` sets them (RANK, WORLD_SIZE), else the only one.

    Raises:
        UserError: they do not fit together.
    """
    if (rank is None) != (world is None):
        raise UserError("--rank and --world go together: which of how many processes this is")
    source = "--rank and --world"
    if rank is None or world is None:
        source = "RANK and WORLD_SIZE"
        texts = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        try:
            rank, world = int(texts[0]), int(texts[1])
        except ValueError as error:
            raise UserError(f"{source} are {texts[0]!r} and {texts[1]!r}, not whole numbers") from error
    if not 0 <= rank < world <= 999:
        raise UserError(f"{source}: rank {rank} of {world} is not one of 0 to {world - 1} (and of 999 at most)")
    return rank, world


def this_device(device: str | None) -> str:
    """As given, else this rank's GPU where there are any, else the CPU."""
    import torch

    if device is not None or not torch.cuda.is_available():
        return device or "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"


def part_name(rank: int, world: int) -> str:
    """The sub-folder of one rank's shards."""
    return f"rank-{rank:03d}-of-{world:03d}"
