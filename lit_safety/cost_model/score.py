"""`lit_safety shards score`: a cost for every image of a folder of shards, by a trained cost model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from lit_safety.core.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lit_safety.cost_model.network import CostScorer
    from lit_safety.data.format.sample import PairMetadata
    from lit_safety.data.format.writer import ShardWriter
    from lit_safety.data.reading.source import Source
    from lit_safety.data.reading.stored import Stored


def score(
    folder: str,
    *,
    cost_model: str,
    out: str,
    existing: Literal["refuse", "keep", "replace"] = "refuse",
    batch_size: int = 32,
    device: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write shards again with the cost of every image in their metadata.

    Images and everything else stay the same, to the byte. A stopped run continues when it is started again.

    Args:
        folder: A folder of shards, a tar file or a pattern of tar files.
        cost_model: The folder of a cost model, as `fit --config configs/cost_model.yaml` exports it.
        out: The folder to write the shards to.
        existing: What to do with pairs that have costs: refuse them, keep the costs (the set then has costs of two
            models), or replace them.
        batch_size: Pairs scored at once.
        device: The device, such as cpu or cuda:1; null: cuda if there is a GPU.
        overwrite: Delete what an earlier run left in `out`.

    Raises:
        UserError: the shards or the cost model cannot be used, a pair has a cost and `existing` is refuse, or a cost is
            not a finite number; names the sample.
    """
    from pathlib import Path

    import torch

    from lit_safety.core.hashes import content_sha256
    from lit_safety.core.progress import counter
    from lit_safety.cost_model.files import load_cost_model
    from lit_safety.data.format.manifest import FILE_NAME, JOURNAL, load_manifest
    from lit_safety.data.format.writer import ShardWriter
    from lit_safety.data.reading.source import open_source
    from lit_safety.users.table import copy_users

    if batch_size < 1:
        raise UserError(f"--batch_size {batch_size}: must be at least 1")
    source, target = open_source(folder, "folder"), Path(out)
    if source.manifest.cache is not None:
        raise UserError(f"{folder}: holds cached latents; score the shards that it was made from, then cache them")
    if Path(folder).resolve() == target.resolve():
        raise UserError(f"--out {out}: is the same folder as the input; name another one")
    by = {"model": content_sha256(cost_model), "existing": existing}
    provenance = source.manifest.provenance | {"cost": {"by": "a cost model", **by}, "scored_from": _identity(source)}
    if (target / FILE_NAME).exists() and not overwrite:
        if load_manifest(target).provenance != provenance:
            raise UserError(f"{target}: already holds other shards; name another folder or give --overwrite true")
        print(f"{target}: is already complete")
        return
    scorer = load_cost_model(cost_model, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if existing == "refuse":
        _refuse_existing(source)
    resumed = (target / JOURNAL).exists() and not overwrite
    per_shard = max(shard.nsamples for shard in source.manifest.shardlist)
    with ShardWriter(
        target, per_shard, provenance=provenance, seeds=source.manifest.seeds, overwrite=overwrite, resume=True
    ) as writer:
        if resumed:
            print(f"{target}: continuing after {len(writer)} pairs")
        with counter("score", source.manifest.nsamples) as count:
            for stored in _batches(source, batch_size):
                fresh = [one for one in stored if one[0] not in writer]
                if fresh:
                    _write(writer, fresh, scorer, keep=existing == "keep")
                for _ in stored:
                    count()
    copy_users(source.given, target)
    manifest = writer.close()
    print(f"{target}: {manifest.nsamples} pairs in {len(manifest.shardlist)} shards, scored by {cost_model}")


def _identity(source: Source) -> list[Any]:
    """What identifies these shards, wherever they are stored."""
    return [list(one) for one in source.identity()]


def _batches(source: Source, size: int) -> Iterator[list[Stored]]:
    from lit_safety.data.reading.stored import stored_pairs

    batch: list[Stored] = []
    for one in stored_pairs(source):
        batch.append(one)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _refuse_existing(source: Source) -> None:
    """Read only the metadata, before pairs are scored."""
    from lit_safety.data.format.sample import parse_metadata

    for number in range(len(source.paths)):
        shard = source.open_shard(number)
        try:
            for index in range(len(shard.index.samples)):
                where = shard.where(index)
                about = parse_metadata(shard.read_member(index, "json"), where)
                if about.cost is not None or any(one.cost is not None for one in about.images):
                    raise UserError(f"{where}: already has a cost; give --existing replace, or keep")
        finally:
            shard.close()


def _write(writer: ShardWriter, stored: list[Stored], scorer: CostScorer, keep: bool) -> None:
    from dataclasses import replace

    from lit_safety.core.images import decode_image
    from lit_safety.data.format.sample import Sides

    def kept(metadata: PairMetadata) -> bool:
        return keep and metadata.knows("cost")

    images = [
        decode_image(data, f"{where}: {name}")
        for _, where, metadata, all_bytes, _ in stored
        if not kept(metadata)
        for name, data in zip(metadata.names, all_bytes, strict=True)
    ]
    costs = iter(scorer.costs(images).double().tolist())
    for key, where, metadata, all_bytes, mask in stored:
        if not kept(metadata):
            found = [next(costs) for _ in metadata.names]
            if not all(abs(cost) < float("inf") for cost in found):
                raise UserError(f"{where}: costs {', '.join(map(str, found))} are not finite; check the model")
            found = [round(cost, 5) for cost in found]
            if metadata.images:
                facts = [
                    one if keep and one.cost is not None else replace(one, cost=cost)
                    for one, cost in zip(metadata.images, found, strict=True)
                ]
                metadata = replace(metadata, images=tuple(facts))
            else:
                metadata = replace(metadata, cost=Sides(*found))
        writer.write_group(key, metadata, all_bytes, cached=mask)
