"""The LightningDataModule that every method trains from: preference pairs streamed from shards."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from numpy.typing import NDArray

from lit_safety.core.categories import CATEGORIES
from lit_safety.core.errors import UserError
from lit_safety.data.format.sample import PairMetadata, parse_metadata
from lit_safety.data.reading.order import Deal, Group, batches_in, mixed_batches, shares
from lit_safety.data.reading.position import DataPosition
from lit_safety.data.reading.select import Filter, Selection, select, take

# What reads shards is imported when they are opened: classes are made, and help is written, sooner.
if TYPE_CHECKING:
    from lit_safety.data.cache.sources import CachedSource
    from lit_safety.data.reading.decode import PairDecoder
    from lit_safety.data.reading.loader import PairLoader
    from lit_safety.data.reading.source import Source

KEY = "data.init_args"
"""Where the arguments stand in a run's YAML."""


class PreferenceDataModule(LightningDataModule):
    """Stream preference pairs from shards as `PairBatch`.

    The order of the training pairs and every random choice for a pair depend only on `seed` and the pass over the
    data, not on the number of ranks and workers; a resumed run continues exactly.

    Args:
        train: Shards to train on: a folder (with `manifest.json`, or just tar files), the URL of a folder with
            `manifest.json` (http, s3, ...), a tar file, a pattern such as `shards/train-{000000..000031}.tar` or
            `shards/*.tar`, or a list of these.
        weights: With a list in `train`: the proportion of its entries in every pass, such as [2, 1]. A pass is as long
            as all pairs together. In the next pass an entry continues where it stopped, so a small entry is repeated
            and all pairs of a large entry are used. null: every pair once a pass.
        val: Shards to validate on, given in the same way. Read in the stored order, every pair once.
        test: Shards to test and predict on, given in the same way.
        batch_size: Pairs in a training batch on each rank; one step sees batch_size x ranks x
            Trainer.accumulate_grad_batches pairs.
        val_batch_size: Pairs in a validation, test or prediction batch; null: as batch_size.
        num_workers: Worker processes that read and decode on each rank; 0 reads in the training process. At
            most the number of shards in `train`.
        seed: Fixes the order of the pairs and every random choice for a pair (timestep, noise, flip ...).
        resolution: Side in pixels: the shorter side is scaled to it, and the middle is cut out; null: as stored.
        aspect_buckets: Cut images to one of a list of shapes instead of a square: the shape that is most like the
            chosen image's own. Each shape has about as many pixels as the square of `resolution`, and its sides are
            multiples of 64 (of 8 or more for resolutions below 512). Every step (on all ranks) has one shape; a shape
            with too few pairs for a step joins the next shape. Needs images on this machine and does not work with a
            cache.
        flip: Mirror half of the training pairs, always both images of a pair.
        use_cache: Read cached latents and text instead of images where shards have them (`shards precompute`). false:
            read the images, which the shards must then hold too.
        use_reference: Take timestep, noise and the reference's errors from the fixed draws of a reference cache
            (`shards precompute --reference_draws`); false: fresh draws, and the reference is run.
        masked: Read `K.mask.png` where pairs have one, white where chosen and rejected differ: errors then count there
            alone. Goes with `use_reference: false` where the reference is cached.
        scaled_jpegs: Decode a JPEG at a half, a quarter or an eighth of its size where that still covers what it is
            scaled to: a few times as fast, and slightly other pixels than a whole decode gives, or a cache holds.
        one_category: For experts: every training step (on all ranks) uses pairs about one category. The categories take
            turns, each as often as it has pairs. A pair about several categories is used in the turns of each; a pair
            without a category is not used. Batches of validation and test hold one category too, one after the other.
        uncategorised: With `categories`, also take pairs without a category. With `one_category` training uses them in
            the turns of every category, so that each expert learns what it must not change.
        consecutive: With `one_category`: train the categories one after the other, each for an equal share of
            `trainer.max_steps`, instead of in turns. Experts under DeepSpeed need it.
        shuffle_window: How many shards are mixed with each other. More shards mix better and keep more files open.
        categories: Take only pairs that are about at least one of these harm categories; null: all pairs.
        kinds: Take only pairs whose prompt is `harmful` or `clean`; null: all pairs.
        orders: Take only pairs whose order was decided by `safety`, `quality` or `composite`; null: all pairs.
        users: Take only the pairs of these users, by their id; null: all pairs.
        on_bad_sample: What to do with a pair that cannot be read: `error` stops; `skip` leaves it out, names it in
            the log, and stops after `bad_sample_limit` of them.
        bad_sample_limit: How many bad pairs `skip` may leave out on each rank.
    """

    def __init__(
        self,
        train: str | list[str] | None = None,
        val: str | list[str] | None = None,
        test: str | list[str] | None = None,
        batch_size: int = 8,
        val_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        resolution: int | None = None,
        flip: bool = False,
        use_cache: bool = True,
        one_category: bool = False,
        consecutive: bool = False,
        shuffle_window: int = 4,
        categories: list[str] | None = None,
        kinds: list[str] | None = None,
        orders: list[str] | None = None,
        users: list[str] | None = None,
        on_bad_sample: Literal["error", "skip"] = "error",
        bad_sample_limit: int = 100,
        weights: list[float] | None = None,
        use_reference: bool = True,
        aspect_buckets: bool = False,
        uncategorised: bool = False,
        masked: bool = False,
        scaled_jpegs: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)  # loggers refuse a key that the module also has
        self.train, self.val, self.test = train, val, test
        self.batch_size = batch_size
        self.val_batch_size = batch_size if val_batch_size is None else val_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.resolution = resolution
        self.flip = flip
        self.use_cache = use_cache
        self.use_reference = use_reference
        self.one_category = one_category
        self.uncategorised = uncategorised
        self.consecutive = consecutive
        self.shuffle_window = shuffle_window
        self.on_bad_sample = on_bad_sample
        self.bad_sample_limit = bad_sample_limit
        self.weights = weights
        self.aspect_buckets = aspect_buckets
        self.masked = masked
        self.scaled_jpegs = scaled_jpegs
        self.filter = replace(Filter.of(categories, kinds, orders, users, KEY), uncategorised=uncategorised)
        self.position = DataPosition()
        """Where training stands in the data."""
        self.bad_samples: dict[str, None] = {}
        """What this rank left out so far (`on_bad_sample: skip`), in the order of reading."""
        self._predictions = False
        self._whole = False
        self._without_images: frozenset[str] = frozenset()
        self._opened: dict[str, tuple[Source, Selection]] = {}
        self._caches: dict[str, CachedSource] = {}
        self._sizes: dict[str, list[NDArray[np.int64]]] = {}
        check_settings(self)

    # ---- Lightning's hooks

    def setup(self, stage: str | None = None) -> None:
        self.check_sources(stage)
        trainer = self.trainer
        if stage != "fit" or trainer is None:
            return
        deal, pairs = self._train_deal(), self._open("train")[1].total
        groups = self._groups("train", deal, warn=True)
        if self.one_category and not groups and not any(c.categories for c in self._open("train")[0].manifest.classes):
            raise UserError(
                f"{KEY}.train: no pair has `categories`, and {KEY}.one_category makes each step of one category: write "
                f"them into the pairs, or set {KEY}.one_category to false"
            )
        check_pass(groups, deal, pairs, self.weights)
        steps_each = self._steps_each(len(groups))
        say_pass(groups, deal, pairs, self.weights)
        if trainer.current_epoch == 0 and trainer.global_step == 0:  # else a fit that continues
            self.position = DataPosition()
        self.position.trainer = trainer
        self.position.signature = self._signature(groups, deal, steps_each)

    def train_dataloader(self) -> PairLoader:
        return self._loader("train", self._train_deal(), self.num_workers, position=self.position)

    def val_dataloader(self) -> PairLoader | list[Any]:
        return [] if self.val is None else self._evaluation_loader("val")

    def test_dataloader(self) -> PairLoader:
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> PairLoader:
        return self._evaluation_loader("test")

    def state_dict(self) -> dict[str, Any]:
        """The position in the training data; Lightning restores this on every resume, a loader's only on some."""
        return self.position.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.position.load_state_dict(state_dict)

    # ---- what is known of the shards before a sample is read

    def check_sources(self, stage: str | None = "fit") -> None:
        """Find the shards a stage reads and check what can be known without reading them.

        It is quick and needs no weights; `setup` calls it too.

        Args:
            stage: `fit`, `validate`, `test` or `predict`; None: all.

        Raises:
            UserError: shards are missing or empty, the filters leave 0 pairs, or there are more workers than shards.
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

    def caches(self, stage: str | None = "fit") -> list[CachedSource]:
        """The caches that a stage reads instead of images, so that the model can be compared with their model.

        Raises:
            UserError: as `check_sources`.
        """
        self.check_sources(stage)
        return [self._caches[name] for name in self._needed(stage) if name in self._caches]

    def users(self, stage: str | None = "fit") -> dict[str, frozenset[str]]:
        """Ids of the users whose pairs a stage reads, by YAML key, as the manifests state them.

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
        """Pairs of `train`, `val` or `test` by their labels, such as `{"safe>harmful": 120}`; filters are not applied.

        Raises:
            UserError: as `open_source`.
        """
        return dict(self._open(name)[0].manifest.labels)

    def orders(self, stage: str | None = "fit") -> dict[str, Counter[str]]:
        """How many pairs a stage reads by what decided their order, for each YAML key and folder, as the manifests
        state.

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

    def kinds(self, name: str) -> Counter[str]:
        """How many of the used pairs of `train`, `val` or `test` have a prompt of each kind, as the manifest states.
        Shards whose manifest does not say it are left out.

        Raises:
            UserError: as `open_source`.
        """
        manifest = self._open(name)[0].manifest
        found: Counter[str] = Counter()
        for number, pairs in Counter(n for shard in manifest.shardlist for n in shard.classes or ()).items():
            one = manifest.classes[number]
            left_out = name == "train" and self.one_category and not self.uncategorised and not one.categories
            if self.filter.takes(one) and not left_out:
                found[one.kind] += pairs
        return found

    def first_pairs(self, stage: str | None = "fit") -> dict[str, tuple[str, PairMetadata]]:
        """Key and metadata of the first pair that a stage reads, for each YAML key and folder. Only its JSON is read.

        A pair that cannot be read is left out here and reported when the stage reads it.

        Raises:
            UserError: as `check_sources`.
        """
        self.check_sources(stage)
        found: dict[str, tuple[str, PairMetadata]] = {}
        for source, selection in (self._opened[name] for name in self._needed(stage)):
            start = 0
            for folder, length in zip(source.caches, source.parts or (len(source.paths),), strict=True):
                shard = next((n for n in range(start, start + length) if selection.counts[n]), None)
                start += length
                if shard is None:
                    continue
                with suppress(UserError), closing(source.open_shard(shard)) as tar:
                    number = selection.number(shard, 0)
                    about = parse_metadata(tar.read_member(number, "json"), tar.where(number))
                    found[f"{source.key}: {folder.given}"] = tar.where(number), about
        return found

    def training_categories(self) -> list[str]:
        """The categories of the steps, in the order of training if they are consecutive.

        Empty without `one_category`.

        Raises:
            UserError: there are no shards to train on.
        """
        if self.train is None:
            raise UserError(f"{KEY}.train is not given; name a folder of shards to train on")
        groups = self._groups("train", self._train_deal()) if self.one_category else []
        return [group.category for group in groups if group.category is not None]

    # ---- what a module may ask for before its batches are made

    def read_predictions(self, wanted: bool) -> None:
        """Whether batches from a reference cache also hold the reference's predictions; at first they do not."""
        self._predictions = wanted

    def read_groups(self, wanted: bool) -> None:
        """Whether batches hold all images of a prompt (`PairBatch.groups`), not the best and the worst alone."""
        if wanted and self.masked:
            raise UserError(f"{KEY}.masked: a mask is of a pair, and this objective reads groups: set it to false")
        self._whole = wanted

    def skip_images(self, sets: Iterable[str]) -> None:
        """From now on, do not decode the images of these of `train`, `val` and `test`; their batches hold the rest."""
        self._without_images = frozenset(sets)

    # ---- the shards that are given: opened and checked once

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
        return [name for name in given if self._given(name) is not None]

    def _given(self, name: str) -> str | list[str] | None:
        return {"train": self.train, "val": self.val, "test": self.test}[name]

    def _open(self, name: str) -> tuple[Source, Selection]:
        """The shards of `train`, `val` or `test`, and which of their pairs pass the filters.

        Raises:
            UserError: they are missing, the filters leave 0 pairs, or their cache does not fit these settings.
        """
        from lit_safety.data.reading.source import open_source

        if name not in self._opened:
            given = self._given(name)
            if given is None:
                raise UserError(f"{KEY}.{name} is not given; name a folder of shards")
            source = open_source(given, f"{KEY}.{name}")
            self._opened[name] = source, select(source, self.filter)
            if not self.use_cache:
                self._check_images(source)
            from lit_safety.data.cache.cache import check_resolution
            from lit_safety.data.cache.sources import cached_source

            cached = cached_source(source, self.use_reference) if self.use_cache else None
            if cached is not None and self.aspect_buckets:
                raise UserError(
                    f"{source.key}: is a cache, which holds images of one size, and {KEY}.aspect_buckets is on: name "
                    f"the shards it was made from, or set {KEY}.use_cache to false if the images are there"
                )
            if cached is not None and cached.cache.reference is not None and self.masked:
                raise UserError(
                    f"{source.key}: its reference cache holds errors of whole images, and {KEY}.masked is on: set "
                    f"{KEY}.use_reference to false"
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
                    "shards it was made from, or make it again with `shards precompute --keep_images true`"
                )

    # ---- how batches are dealt

    def _ranks(self) -> tuple[int, int]:
        """This rank among the ranks that get different data. Ranks that share a model by tensors get the same data."""
        sharded = {} if self.trainer is None else (self.trainer.distributed_sampler_kwargs or {})
        return sharded.get("rank", 0), sharded.get("num_replicas", 1)

    def _train_deal(self) -> Deal:
        accumulate = 1 if self.trainer is None else self.trainer.accumulate_grad_batches
        return Deal(self.batch_size, *self._ranks(), accumulate=accumulate)

    def _steps_each(self, categories: int) -> int | None:
        """How many steps each category is trained for if they come one after the other."""
        if not self.consecutive:
            return None
        steps = -1 if self.trainer is None else self.trainer.max_steps
        if steps < 1 or steps % categories:
            raise UserError(
                f"{KEY}.consecutive: true divides trainer.max_steps evenly among {categories} categories: set it to a "
                f"multiple of {categories}, not {steps}"
            )
        return steps // categories

    # ---- which pairs are batched with each other

    def _groups(self, name: str, deal: Deal, warn: bool = False) -> list[Group]:
        """The pairs of `train`, `val` or `test` as one group, or as several."""
        if name == "train" and self.weights is not None:
            return self._by_source(name)
        if self.aspect_buckets and self.resolution is not None:
            return self._by_shape(name, deal, self.resolution)
        if self.one_category:
            return self._by_category(name, deal, warn)
        return [Group(self._open(name)[1])]

    def _by_source(self, name: str) -> list[Group]:
        """One group for each entry of the list that the pairs come from."""
        source, selection = self._open(name)
        groups, start = [], 0
        for number, shards in enumerate(source.parts):
            groups.append(Group(selection.part(start, start + shards)))
            start += shards
            if not groups[-1].selection.total:
                raise UserError(f"{source.key}[{number}]: no sample is left after the filter, and it has a weight")
        return groups

    def _by_shape(self, name: str, deal: Deal, resolution: int) -> list[Group]:
        """One group for each shape of image that has pairs enough for a step."""
        from lit_safety.data.reading.buckets import bucket_groups, chosen_sizes

        source, selection = self._open(name)
        if name not in self._sizes:
            self._sizes[name] = chosen_sizes(source, f"{KEY}.aspect_buckets")
        least = 1 if deal.ragged else deal.batch_size * deal.world * deal.accumulate
        return bucket_groups(selection, self._sizes[name], resolution, least)

    def _by_category(self, name: str, deal: Deal, warn: bool) -> list[Group]:
        """One group for each category that has pairs enough for a step."""
        source, _ = self._open(name)
        groups = []
        for category in self.filter.categories or CATEGORIES:
            own = replace(self.filter, categories=(category,), uncategorised=False)
            found = take(source, own)
            if found.total and name == "train" and self.uncategorised:
                found = take(source, replace(own, uncategorised=True))
            if deal.batches(found.total):
                groups.append(Group(found, category))
            elif found.total and warn:
                rank_zero_warn(f"{source.key}: the {found.total} pairs of {category} are too few for a step: left out")
        return groups

    # ---- what tells them from those of other settings

    def _signature(self, groups: Sequence[Group], deal: Deal, steps_each: int | None) -> dict[str, int | bool | str]:
        """What must be equal to resume in the middle of a pass over the training pairs: `DataPosition.signature`."""
        signature: dict[str, int | bool | str] = {
            f"{KEY}.batch_size x ranks": deal.batch_size * deal.world,
            "trainer.accumulate_grad_batches": deal.accumulate,
            f"pairs in {KEY}.train": self._open("train")[1].total,
            f"the fingerprint of {KEY}.train and its filters": self._pairs_sha256(),
            f"{KEY}.seed": self.seed,
            f"{KEY}.shuffle_window": self.shuffle_window,
            f"{KEY}.one_category": self.one_category,
            f"{KEY}.uncategorised": self.uncategorised,
        }
        if self.scaled_jpegs:
            signature[f"{KEY}.scaled_jpegs"] = True
        if self.aspect_buckets:
            signature[f"{KEY}.resolution with {KEY}.aspect_buckets"] = str(self.resolution)
        if steps_each is not None:
            signature["the steps of one category"] = steps_each
        if self.weights is not None:
            weights, sizes = [float(one) for one in self.weights], [group.selection.total for group in groups]
            signature[f"{KEY}.weights and the pairs of each"] = f"{weights} of {sizes}"
        return signature

    def _pairs_sha256(self) -> str:
        """Differs when other pairs take part, or others together; the same for a copy of the shards elsewhere."""
        listed = [(one.nsamples, one.bytes, one.sha256) for one in self._open("train")[0].manifest.shardlist]
        parts = (listed, self.filter, "shapes") if self.aspect_buckets else (listed, self.filter)
        return hashlib.blake2b(repr(parts).encode(), digest_size=6).hexdigest()

    # ---- loaders

    def _evaluation_loader(self, name: str) -> PairLoader:
        source, _ = self._open(name)
        deal = Deal(self.val_batch_size, *self._ranks(), ragged=True)
        groups = self._groups(name, deal)
        if not groups:
            raise UserError(f"{source.key}: {KEY}.one_category asks for pairs about a category, and there are none")
        if repeated := sum(deal.repeated(group.selection.total) for group in groups):
            rank_zero_warn(f"{source.key}: {repeated} batches are read twice to keep {deal.world} ranks in step")
        return self._loader(name, deal, min(self.num_workers, len(source.paths)))

    def _decoder(self, name: str, training: bool) -> PairDecoder:
        from lit_safety.data.reading.decode import PairDecoder

        cached = self._caches.get(name)
        cache, prompts = (None, None) if cached is None else (cached.cache, cached.prompts)
        flip = self.flip and training
        without_images = name in self._without_images
        return PairDecoder(
            self.seed,
            self.resolution,
            flip,
            cache,
            prompts,
            self._predictions,
            without_images,
            self.masked,
            self._whole,
            self.scaled_jpegs,
        )

    def _loader(self, name: str, deal: Deal, num_workers: int, position: DataPosition | None = None) -> PairLoader:
        from lit_safety.data.reading.loader import PairLoader, PairStream

        training = position is not None
        trainer: Any = self.trainer
        overfit = 0 if trainer is None else trainer.overfit_batches  # then every pass is the same
        source, _ = self._open(name)
        groups = self._groups(name, deal)
        stream = PairStream(
            source,
            groups,
            deal,
            self._decoder(name, training),
            shuffle=training and not overfit,
            window=self.shuffle_window,
            skip_bad=self.on_bad_sample == "skip",
            steps_each=self._steps_each(len(groups)) if training else None,
            weights=self.weights if training else None,
        )
        return PairLoader(
            stream, num_workers, torch.cuda.is_available(), position, self.bad_sample_limit, self.bad_samples
        )


# What is wrong with the settings by themselves, said before anything is opened.


def check_settings(data: PreferenceDataModule) -> None:
    """What can be said of a datamodule's settings by themselves.

    Raises:
        UserError: one is out of its range, or two do not go together; names the keys.
    """
    for name, given, least in (
        ("batch_size", data.batch_size, 1),
        ("val_batch_size", data.val_batch_size, 1),
        ("num_workers", data.num_workers, 0),
        ("shuffle_window", data.shuffle_window, 1),
        ("bad_sample_limit", data.bad_sample_limit, 0),
    ):
        if given < least:
            raise UserError(f"{KEY}.{name} must be at least {least}, not {given}")
    if data.resolution is not None and data.resolution < 1:
        raise UserError(f"{KEY}.resolution must be at least 1 pixel, not {data.resolution}")
    if data.consecutive and not data.one_category:
        raise UserError(f"{KEY}.consecutive: true is about batches of one category: set {KEY}.one_category: true")
    if data.aspect_buckets:
        if data.resolution is None:
            raise UserError(
                f"{KEY}.aspect_buckets: true cuts images to about resolution^2 pixels: set {KEY}.resolution"
            )
        if data.one_category or data.weights is not None:
            other = "one_category" if data.one_category else "weights"
            raise UserError(f"{KEY}.aspect_buckets divides batches, {KEY}.{other} too: leave one of them out")
    if data.weights is not None:
        entries = len(data.train) if isinstance(data.train, list) else 0
        if len(data.weights) != entries or not all(0 < weight < float("inf") for weight in data.weights):
            raise UserError(
                f"{KEY}.weights must hold a number above 0 for each entry of the list {KEY}.train, which has "
                f"{entries or 'none: it is no list'}"
            )
        if data.one_category:
            raise UserError(f"{KEY}.weights mixes batches, {KEY}.one_category divides them: leave one of them out")
    if data.on_bad_sample not in ("error", "skip"):
        raise UserError(f"{KEY}.on_bad_sample must be error or skip, not {data.on_bad_sample!r}")


# A pass over the training pairs, before it begins: whether it has a step, and what it takes of them.


def check_pass(groups: Sequence[Group], deal: Deal, pairs: int, weights: Sequence[float] | None) -> None:
    """Whether a pass has a step.

    Args:
        groups: the pairs that are batched with each other; empty if all categories have too few pairs for a step.
        deal: how they are dealt to steps.
        pairs: how many are used, also those outside of all groups.
        weights: the proportion of the groups in each batch; None: a batch holds one group.

    Raises:
        UserError: the pairs are too few.
    """
    batches = batches_in(groups, deal) if weights is None else mixed_batches(groups, deal)
    if batches:
        return
    held = (
        f"{pairs} pairs, fewer than one step needs"
        if groups
        else f"{pairs} pairs, but each category has fewer than one step needs"
    )
    raise UserError(
        f"{KEY}.train has {held}: {deal.batch_size} ({KEY}.batch_size) x {deal.world} (ranks) x "
        f"{deal.accumulate} (trainer.accumulate_grad_batches)"
    )


def say_pass(groups: Sequence[Group], deal: Deal, pairs: int, weights: Sequence[float] | None) -> None:
    """Log what a pass uses and leaves out. Arguments are those of `check_pass`.

    Raises:
        UserError: a weight is so small that a pass would not use its group.
    """
    if weights is not None:
        _say_mix(groups, deal, weights)
    elif dropped := sum(deal.dropped(group.selection.total) for group in groups):
        rank_zero_info(f"each pass leaves out {dropped} of {pairs} training pairs, and different ones each time")
    if shapes := ", ".join(f"{group.name} ({group.selection.total})" for group in groups if group.size is not None):
        rank_zero_info(f"pairs by shape: {shapes}")


def _say_mix(groups: Sequence[Group], deal: Deal, weights: Sequence[float]) -> None:
    each = shares(weights, mixed_batches(groups, deal) * deal.batch_size * deal.world)
    for number, (share, group, weight) in enumerate(zip(each, groups, weights, strict=True)):
        if not share:
            raise UserError(f"{KEY}.weights[{number}] is {weight}: 0 pairs in a pass of {sum(each)}; raise it")
        rank_zero_info(f"a pass uses {share} pairs of the {group.selection.total} in {KEY}.train[{number}]")
