"""`lit_safety shards join`: one manifest for the shards of several folders, which are not moved."""

from __future__ import annotations

import os
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from lit_safety.core.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from lit_safety.data.format.manifest import Manifest
    from lit_safety.data.format.writer import ShardWriter

PART = re.compile(r"rank-(\d{3})-of-(\d{3})")


def join(folder: str, overwrite: bool = False) -> None:
    """Write a manifest for the shards in a folder's sub-folders, so that they are read as one set.

    For shards that several processes wrote, and for any folders of shards in one folder. Shards are not copied.

    Args:
        folder: A folder whose sub-folders each hold shards and a manifest.
        overwrite: Replace a manifest that is already there.
    """
    from pathlib import Path

    from lit_safety.data.format.manifest import FILE_NAME, JOURNAL, load_manifest, save_manifest

    top = Path(folder)
    if (top / FILE_NAME).exists() and not overwrite:
        raise UserError(f"{top}: already holds a {FILE_NAME}; give --overwrite true to write it again")
    names = sorted(path.parent.name for path in top.glob(f"*/{FILE_NAME}"))
    if not names:
        raise UserError(f"{top}: does not have a sub-folder with a {FILE_NAME}")
    _check_ranks(top, names)
    if unfinished := sorted(path.parent.name for path in top.glob(f"*/{JOURNAL}") if path.parent.name not in names):
        raise UserError(f"{top / unfinished[0]}: is not complete: wait for the run that writes it, or start it again")
    for name in names:
        if beside := sorted((top / name).glob("[!.]*.safetensors")):
            raise UserError(f"{beside[0]}: belongs to one folder's shards; join the folders before it is made")
    manifest = joined({name: load_manifest(top / name) for name in names}, str(top))
    save_manifest(manifest, top)
    print(f"{top}: {manifest.nsamples} pairs in {len(manifest.shardlist)} shards of {len(names)} folders")


def joined(parts: dict[str, Manifest], where: str) -> Manifest:
    """One manifest for the shards of several manifests.

    Raises:
        UserError: they are empty, or hold caches of different models.
    """
    from dataclasses import replace

    from lit_safety.data.format.manifest import Manifest, SampleClass, Shard

    classes: dict[SampleClass, int] = {}
    labels: Counter[str] = Counter()
    shards: list[Shard] = []
    for name, part in parts.items():
        if part.cache != next(iter(parts.values())).cache:
            raise UserError(f"{where}: {name} holds a cache of another model than {next(iter(parts))}")
        numbers = [classes.setdefault(one, len(classes)) for one in part.classes]
        labels.update(part.labels)
        for shard in part.shardlist:
            listed = None if shard.classes is None else tuple(numbers[n] for n in shard.classes)
            shards.append(replace(shard, url=f"{name}/{shard.url}", classes=listed))
    if not shards:
        raise UserError(f"{where}: its folders ({', '.join(parts)}) hold 0 pairs")
    first = next(iter(parts.values()))
    same = all((part.provenance, part.seeds) == (first.provenance, first.seeds) for part in parts.values())
    provenance: dict[str, Any] = first.provenance if same else {name: p.provenance for name, p in parts.items()}
    seeds: dict[str, Any] = first.seeds if same else {name: p.seeds for name, p in parts.items()}
    return Manifest(tuple(shards), tuple(classes), dict(labels), provenance, seeds, first.cache)


def join_when_done(folder: Path, world: int, provenance: dict[str, Any], seeds: dict[str, Any]) -> None:
    """Join what `world` processes wrote, if all of them are done. Several processes may call this at once.

    What an earlier run with another `provenance` or other `seeds` left does not count as done: it will be overwritten.
    """
    from filelock import FileLock

    from lit_safety.data.format.manifest import FILE_NAME, load_manifest

    def done(part: Path) -> bool:
        if not (part / FILE_NAME).exists():
            return False
        manifest = load_manifest(part)
        return (manifest.provenance, manifest.seeds) == (provenance, seeds)

    with FileLock(folder / ".join.lock"):
        left = [rank for rank in range(world) if not done(folder / part_name(rank, world))]
        if not left:
            join(str(folder), overwrite=True)
        else:
            print(f"{folder}: {len(left)} of {world} processes have not finished")


def save_empty(writer: ShardWriter) -> None:
    """End a writer that got no samples, with a manifest of 0 samples."""
    from lit_safety.data.format.manifest import JOURNAL, Manifest, save_manifest

    writer.manifest = Manifest((), provenance=writer.provenance, seeds=writer.seeds)
    save_manifest(writer.manifest, writer.folder)
    (writer.folder / JOURNAL).unlink(missing_ok=True)


def _check_ranks(top: Path, names: list[str]) -> None:
    """All parts of one run must be there: a missing part would go unnoticed."""
    found = [match for name in names if (match := PART.fullmatch(name))]
    worlds = {int(match[2]) for match in found}
    if len(worlds) > 1 or (found and len(found) < len(names)):
        raise UserError(f"{top}: holds shards of runs with different numbers of processes: {', '.join(names)}")
    missing = sorted(set(range(max(worlds, default=0))) - {int(match[1]) for match in found})
    if missing:
        raise UserError(f"{top}: rank {missing[0]} of {worlds.pop()} has not finished; run it, then join")


# Which process this is among several that share the work.


def this_rank(rank: int | None, world: int | None) -> tuple[int, int]:
    """Rank and number of ranks: as given, else as `torchrun` sets them (RANK, WORLD_SIZE), else 0 of 1.

    Raises:
        UserError: they do not fit together.
    """
    if (rank is None) != (world is None):
        raise UserError("--rank and --world: give both (which process this is, and how many there are)")
    source = "--rank and --world"
    if rank is None or world is None:
        source = "RANK and WORLD_SIZE"
        texts = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        try:
            rank, world = int(texts[0]), int(texts[1])
        except ValueError as error:
            raise UserError(f"{source} are {texts[0]!r} and {texts[1]!r}, not whole numbers") from error
    if not 0 <= rank < world <= 999:
        raise UserError(f"{source}: rank {rank} of {world} must lie between 0 and {world - 1} (with 999 ranks at most)")
    return rank, world


def this_device(device: str | None) -> str:
    """As given, else this rank's GPU if there are GPUs, else the CPU."""
    import torch

    if device is not None or not torch.cuda.is_available():
        return device or "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"


def part_name(rank: int, world: int) -> str:
    """The sub-folder of one rank's shards."""
    return f"rank-{rank:03d}-of-{world:03d}"
