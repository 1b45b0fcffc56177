"""The shards that a datamodule is given: opened, checked and looked up before a model is touched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import islice

from lightning.pytorch import LightningDataModule

from lit_safety.data.cache import check_resolution
from lit_safety.data.cached_source import CachedSource, cached_source
from lit_safety.data.select import Filter, Selection, select
from lit_safety.data.settings_check import KEY
from lit_safety.data.source import Source, open_source
from lit_safety.errors import UserError


class GivenShards(LightningDataModule):
    """What stands in the shards of `train`, `val` and `test`, as far as can be known without reading samples.

    Its attributes are `PreferenceDataModule`'s arguments.
    """

    train: str | list[str] | None
    val: str | list[str] | None
    test: str | list[str] | None
    num_workers: int
    resolution: int | None
    aspect_buckets: bool
    flip: bool
    use_cache: bool
    use_reference: bool
    filter: Filter

    def __init__(self) -> None:
        super().__init__()
        self._opened: dict[str, tuple[Source, Selection]] = {}
        self._caches: dict[str, CachedSource] = {}

    def check_sources(self, stage: str | None = "fit") -> None:
        """Find the shards a stage reads and check what can be known without reading them.

        Cheap, and safe to call before weights are loaded; `setup` calls it too.

        Args:
            stage: `fit`, `validate`, `test` or `predict`; None: all that is given.

        Raises:
            UserError: shards are missing, empty or filtered away, or there are more workers than shards.
        """
        for name in self._needed(stage):
            self._open(name)
        if "train" in self._opened:
            shards = len(self._opened["train"][0].paths)
            if self.num_workers > shards:
                raise UserError(
                    f"{KEY}.num_workers is {self.num_workers} but {KEY}.train has only {shards} "
                    f"shard{'s' if shards > 1 else ''}; lower it to {shards}, or write more, smaller shards"
                )

    def _needed(self, stage: str | None) -> list[str]:
        if stage == "fit":
            if self.train is None:
                raise UserError(f"{KEY}.train is not given; name a folder of shards to train on")
            return ["train"] if self.val is None else ["train", "val"]
        if stage == "validate" and self.val is None:
            raise UserError(f"{KEY}.val is not given; name a folder of shards to validate on")
        if stage in ("test", "predict") and self.test is None:
            raise UserError(f"{KEY}.test is not given; name a folder of shards to {stage} on")
        given = {"validate": ["val"], "test": ["test"], "predict": ["test"]}.get(str(stage), ["train", "val", "test"])
        return [name for name in given if getattr(self, name) is not None]

    def _open(self, name: str) -> tuple[Source, Selection]:
        if name not in self._opened:
            given: str | Sequence[str] = getattr(self, name)
            source = open_source(given, f"{KEY}.{name}")
            self._opened[name] = source, select(source, self.filter)
            if not self.use_cache:
                self._check_images(source)
            cached = cached_source(source, self.use_reference) if self.use_cache else None
            if cached is not None and self.aspect_buckets:
                raise UserError(
                    f"{source.key}: is a cache, which holds pictures of one size, and {KEY}.aspect_buckets is on: name "
                    f"the shards it was made from, or set {KEY}.use_cache to false if the images are there"
                )
            if cached is not None:
                check_resolution(cached.cache, self.resolution, self.flip and name == "train", source.key, KEY)
                self._caches[name] = cached
        return self._opened[name]

    def _check_images(self, source: Source) -> None:
        for one in source.caches:
            if one.cache and one.cache.get("images") is not True:
                raise UserError(
                    f"{source.key}: {KEY}.use_cache is false, but {one.given} holds latents and no images; name the "
                    "shards it was made from, or make it anew with `shards precompute --keep_images true`"
                )

    def caches(self, stage: str | None = "fit") -> list[CachedSource]:
        """What a stage reads from caches instead of images, so that a model can be compared with its maker.

        Raises:
            UserError: as `check_sources`.
        """
        self.check_sources(stage)
        return [self._caches[name] for name in self._needed(stage) if name in self._caches]

    def users(self, stage: str | None = "fit") -> dict[str, frozenset[str]]:
        """Ids of the users whose pairs a stage reads, by YAML key, as far as the manifests say.

        Raises:
            UserError: as `check_sources`.
        """
        self.check_sources(stage)
        return {
            f"{KEY}.{name}": frozenset(
                one.user
                for one in self._opened[name][0].manifest.classes
                if one.user is not None and self.filter.takes(one)
            )
            for name in self._needed(stage)
        }

    def labels(self, name: str) -> dict[str, int]:
        """Pairs of `train`, `val` or `test` by their labels, such as `{"safe>harmful": 120}`; filters do not count.

        Raises:
            UserError: as `open_source`.
        """
        return dict(self._open(name)[0].manifest.labels)

    def orders(self, stage: str | None = "fit") -> dict[str, Counter[str]]:
        """How many pairs a stage reads by what decided their order, for each YAML key and folder, as far as the
        manifests say.

        Raises:
            UserError: as `check_sources`.
        """
        self.check_sources(stage)
        counts: dict[str, Counter[str]] = {}
        for source in (self._opened[name][0] for name in self._needed(stage)):
            shards, classes = iter(source.manifest.shardlist), source.manifest.classes
            for folder, length in zip(source.caches, source.parts or (len(source.paths),), strict=True):
                found = counts.setdefault(f"{source.key}: {folder.given}", Counter())
                for number, pairs in Counter(n for one in islice(shards, length) for n in one.classes or ()).items():
                    if self.filter.takes(classes[number]):
                        found[classes[number].order] += pairs
        return counts
