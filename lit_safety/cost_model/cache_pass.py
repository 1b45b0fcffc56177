"""The pass that fills the feature cache before a fit, each rank its share of the pairs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from lit_safety.cost_model.degrade import Degradation
from lit_safety.cost_model.feature_cache import FeatureCache, cache_name, compute_features
from lit_safety.cost_model.tower import ClipTower
from lit_safety.data.datamodule import KEY, PreferenceDataModule
from lit_safety.data.decode import PairDecoder
from lit_safety.data.loader import PairLoader
from lit_safety.data.order import Deal
from lit_safety.data.plan import Group
from lit_safety.data.progress import counter
from lit_safety.data.select import select
from lit_safety.data.source import open_source
from lit_safety.data.stream import PairStream
from lit_safety.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lit_safety.data.batch import PairBatch


def cached_features(
    folder: Path, data: PreferenceDataModule, part: str, tower: ClipTower, degradation: Degradation, trainer: Trainer
) -> FeatureCache:
    """The features of ``part`` ("train" or "val") of the data, from ``folder``; computed where they are not there.

    Raises:
        UserError: the pairs are mirrored at random, which a cache cannot follow, or cannot be read.
    """
    if data.flip and part == "train":
        raise UserError(f"{KEY}.flip mirrors other pairs in every pass: leave it off, or model.init_args.feature_cache")
    source = open_source(getattr(data, part), f"{KEY}.{part}")
    selection = select(source, data.filter)
    listed = [  # tar files are filled up, so that others of the same name and size are common: their content counts
        (Path(one.url).name, one.nsamples, one.bytes, content)
        for one, (_, content) in zip(source.manifest.shardlist, source.identity(), strict=True)
    ]
    name = cache_name([tower.fingerprint, tower.features, degradation, data.resolution, listed, data.filter])
    file = folder / name
    found = FeatureCache.load(file)
    if found is not None and len(found) > 0:
        return found
    rank, world = trainer.global_rank, trainer.world_size
    stream = PairStream(
        source,
        [Group(selection)],
        Deal(data.val_batch_size, rank, world, ragged=True),
        PairDecoder(data.seed, data.resolution),
        shuffle=False,
        window=1,
        skip_bad=data.on_bad_sample == "skip",
    )
    loader = PairLoader(stream, min(data.num_workers, len(source.paths)), bad_sample_limit=data.bad_sample_limit)
    rank_zero_info(f"computing the CLIP features of {selection.total} {part} pairs, {len(degradation.all)} views each")
    mine = compute_features(_counted(loader, part), tower, degradation)
    if world > 1:
        mine.save(folder / f"{name}.{rank}")
        trainer.strategy.barrier("features computed")
        parts = [FeatureCache.load(folder / f"{name}.{other}") for other in range(world)]
        if any(one is None for one in parts):
            raise UserError(f"{folder}: model.init_args.feature_cache must be a folder that all ranks share")
        mine = FeatureCache.join([one for one in parts if one is not None])
        trainer.strategy.barrier("features read")
        (folder / f"{name}.{rank}").unlink()
    if trainer.is_global_zero:
        mine.save(file)
    return mine


def _counted(loader: PairLoader, part: str) -> Iterator[PairBatch]:
    with counter(f"features of {part} batches", len(loader)) as count:
        for batch in loader:
            count()
            yield batch
