"""CLIP features of a set of shards, computed once: the tower is frozen, so they never change.

One safetensors file a set. Its name depends on everything that decides the features (CLIP, output, views, resolution,
shards and filters), so another CLIP or other shards never use it. With it a training step runs only a small MLP,
without decoding images and without CLIP.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lit_safety.core.errors import UserError
from lit_safety.core.files import write_atomic
from lit_safety.core.progress import counter
from lit_safety.core.text import load_json
from lit_safety.cost_model.degrade import Degradation
from lit_safety.cost_model.network import ClipTower
from lit_safety.data.datamodule import KEY, PreferenceDataModule
from lit_safety.data.reading.batch import PairBatch, to_floats
from lit_safety.data.reading.decode import PairDecoder
from lit_safety.data.reading.loader import PairLoader, PairStream
from lit_safety.data.reading.order import Deal, Group
from lit_safety.data.reading.select import select
from lit_safety.data.reading.source import open_source

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class FeatureCache:
    """Features of every pair of a set, by the sample's key."""

    rows: dict[str, int]
    """Key -> row."""
    features: Tensor
    """float32 (N, 2 sides, V views, D), on the CPU; view 0 is the image itself."""

    def __len__(self) -> int:
        return len(self.rows)

    def __contains__(self, key: str) -> bool:
        return key in self.rows

    def get(self, keys: Sequence[str], views: Sequence[int]) -> Tensor:
        """Features (B, 2, D) of these samples, one view of each.

        Raises:
            UserError: a sample is missing, because its images could not be read.
        """
        try:
            rows = torch.tensor([self.rows[key] for key in keys])
        except KeyError as error:
            raise UserError(f"sample {error.args[0]}: its images could not be read, so it has no features; take it out "
                            "of the shards, or train without `feature_cache`") from error  # fmt: skip
        return self.features[rows, :, torch.tensor(list(views))]

    def save(self, file: Path) -> None:
        """Write the file whole or not at all.

        Raises:
            UserError: it cannot be written.
        """
        keys = json.dumps(sorted(self.rows, key=self.rows.__getitem__))
        write_atomic(file, save({"features": self.features.contiguous()}, {"keys": keys}))

    @classmethod
    def load(cls, file: Path) -> FeatureCache | None:
        """What `save` wrote; None if there is no usable file, so that the features must be computed."""
        try:
            with safe_open(file, framework="pt") as handle:
                keys = load_json((handle.metadata() or {})["keys"])
                features = handle.get_tensor("features")
        except (OSError, SafetensorError, KeyError, ValueError):
            return None
        return cls({key: row for row, key in enumerate(keys)}, features) if len(keys) == len(features) else None

    @classmethod
    def join(cls, parts: Sequence[FeatureCache]) -> FeatureCache:
        """The parts that several ranks computed, as one. A key in two parts is used once."""
        kept: dict[str, tuple[int, int]] = {}
        for number, part in enumerate(parts):
            for key, row in part.rows.items():
                kept.setdefault(key, (number, row))
        features = torch.stack([parts[number].features[row] for number, row in kept.values()])
        return cls({key: row for row, key in enumerate(kept)}, features)


def compute_features(batches: Iterable[PairBatch], tower: ClipTower, degradation: Degradation) -> FeatureCache:
    """Features of both images of every pair, in all views.

    Raises:
        UserError: a pair lacks images, or two pairs with different images share a key.
    """
    rows: dict[str, int] = {}
    found: list[Tensor] = []
    for batch in batches:
        images = images_of(batch)
        worn = [degradation(images.flatten(0, 1), doubled(batch.keys), [v] * 2 * len(batch)) for v in degradation.all]
        features = torch.stack([tower(view).view(len(batch), 2, -1).cpu() for view in worn], dim=2)
        for key, one in zip(batch.keys, features, strict=True):
            if key not in rows:
                rows[key] = len(found)
                found.append(one)
            elif not torch.allclose(found[rows[key]], one, atol=1e-3, rtol=1e-3):
                raise UserError(f"sample {key}: two pairs of different images have this key; give each its own, or "
                                "train without `feature_cache`")  # fmt: skip
    return FeatureCache(rows, torch.stack(found))


def images_of(batch: PairBatch) -> Tensor:
    """Both images of each pair: (B, 2, 3, H, W).

    Raises:
        UserError: the shards hold cached latents but no images.
    """
    if batch.chosen is None or batch.rejected is None:
        raise UserError(f"sample {batch.keys[0]} lacks its images: a cost model is trained on shards with images")
    return to_floats(torch.stack([batch.chosen, batch.rejected], dim=1))


def doubled(values: Sequence) -> list:
    """[a, b] -> [a, a, b, b]: one value for each image of a pair."""
    return [value for value in values for _ in range(2)]


def cache_name(parts: Sequence[object]) -> str:
    """A file name that depends on everything that decides the features."""
    return f"features-{hashlib.blake2b(repr(tuple(parts)).encode(), digest_size=12).hexdigest()}.safetensors"


# The pass that fills the feature cache before a fit, each rank its share of the pairs.


def cached_features(
    folder: Path, data: PreferenceDataModule, part: str, tower: ClipTower, degradation: Degradation, trainer: Trainer
) -> FeatureCache:
    """The features of ``part`` ("train" or "val") of the data, from ``folder``; computed if they are missing.

    Raises:
        UserError: the pairs are mirrored at random, which a cache cannot reproduce, or cannot be read.
    """
    if data.flip and part == "train":
        raise UserError(f"{KEY}.flip mirrors other pairs in every pass: switch it or model.init_args.feature_cache off")
    source = open_source(getattr(data, part), f"{KEY}.{part}")
    selection = select(source, data.filter)
    listed = [  # tar files are padded, so different ones often have the same name and size: their content counts
        (Path(one.url).name, one.nsamples, one.bytes, content)
        for one, (_, content) in zip(source.manifest.shardlist, source.identity(), strict=True)
    ]
    name = cache_name([tower.sha256, tower.features, degradation, data.resolution, listed, data.filter])
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
