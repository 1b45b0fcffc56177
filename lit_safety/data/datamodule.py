"""The LightningDataModule that every method trains from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_safety.data.categories import CATEGORIES
from lit_safety.data.decode import PairDecoder
from lit_safety.data.loader import PairLoader
from lit_safety.data.order import Deal
from lit_safety.data.place import Place
from lit_safety.data.plan import Group, batches_in
from lit_safety.data.select import Filter, Selection, select, take
from lit_safety.data.source import Source, open_source
from lit_safety.data.stream import PairStream
from lit_safety.errors import UserError

KEY = "data.init_args"


class PreferenceDataModule(LightningDataModule):
    """Streams preference pairs from shards as `PairBatch`.

    The order of the training pairs and every random choice made for one are pure functions of `seed` and the
    pass over the data, whatever the number of ranks and workers; a resumed run continues exactly.

    Args:
        train: Shards to train on: a folder (with `manifest.json`, or just tar files), the URL of a folder with
            `manifest.json` (http, s3, ...), a tar file, a pattern such as `shards/train-{000000..000031}.tar` or
            `shards/*.tar`, or a list of these.
        val: Shards to validate on, given likewise. Read in the stored order, every pair once.
        test: Shards to test and predict on, given likewise.
        batch_size: Pairs in a training batch on each rank; one step sees batch_size x ranks x
            Trainer.accumulate_grad_batches pairs.
        val_batch_size: Pairs in a validation, test or prediction batch; null: as batch_size.
        num_workers: Worker processes that read and decode on each rank; 0 reads in the training process. At
            most the number of shards in `train`.
        seed: Fixes the order of the pairs and every random choice made for one (timestep, noise, flip ...).
        resolution: Side in pixels: images are scaled until the shorter side fits and cut square from the
            middle; null: as stored.
        flip: Mirror half of the training pairs, both images of a pair alike.
        one_category: Make every training step (on all ranks) of pairs about one category, for experts; the categories
            take turns, each as often as it has pairs. A pair about several categories takes part in the turns of each,
            one about none in no turn.
        shuffle_window: How many shards are mixed with each other; more mixes better and keeps more files open.
        categories: Take only pairs that are about at least one of these harm categories; null: all pairs.
        kinds: Take only pairs whose prompt is `harmful` or `clean`; null: all pairs.
        orders: Take only pairs whose order was decided by `safety`, `quality` or `composite`; null: all pairs.
        users: Take only the pairs of these users, by their id; null: all pairs.
        on_bad_sample: What to do with a pair that cannot be read: `error` stops; `skip` leaves it out, names
            it in the log and stops after `bad_sample_limit` of them.
        bad_sample_limit: How many bad pairs `skip` bears on each rank.
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
        one_category: bool = False,
        shuffle_window: int = 4,
        categories: list[str] | None = None,
        kinds: list[str] | None = None,
        orders: list[str] | None = None,
        users: list[str] | None = None,
        on_bad_sample: Literal["error", "skip"] = "error",
        bad_sample_limit: int = 100,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)  # a key that the module has too would be refused by the loggers
        self.train, self.val, self.test = train, val, test
        self.batch_size = batch_size
        self.val_batch_size = batch_size if val_batch_size is None else val_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.resolution = resolution
        self.flip = flip
        self.one_category = one_category
        self.shuffle_window = shuffle_window
        self.on_bad_sample = on_bad_sample
        self.bad_sample_limit = bad_sample_limit
        self.filter = Filter.of(categories, kinds, orders, users, KEY)
        self.place = Place()
        """Where training stands in the data."""
        self.bad_samples: dict[str, None] = {}
        """What this rank left out so far (`on_bad_sample: skip`), in the order in which it was met."""
        self._opened: dict[str, tuple[Source, Selection]] = {}
        self._check_numbers()

    def _check_numbers(self) -> None:
        for name, least in (
            ("batch_size", 1),
            ("val_batch_size", 1),
            ("num_workers", 0),
            ("shuffle_window", 1),
        ):
            if getattr(self, name) < least:
                raise UserError(f"{KEY}.{name} must be at least {least}, not {getattr(self, name)}")
        if self.resolution is not None and self.resolution < 1:
            raise UserError(f"{KEY}.resolution must be at least 1 pixel, not {self.resolution}")
        if self.on_bad_sample not in ("error", "skip"):
            raise UserError(f"{KEY}.on_bad_sample must be error or skip, not {self.on_bad_sample!r}")

    # ---- what can be known before a model is touched

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
        return self._opened[name]

    # ---- Lightning's hooks

    def setup(self, stage: str | None = None) -> None:
        self.check_sources(stage)
        trainer = self.trainer
        if stage != "fit" or trainer is None:
            return
        deal, total = self._train_deal(), self._open("train")[1].total
        groups = self._groups("train", deal, warn=True)
        if batches_in(groups, deal) == 0:
            held = (
                f"no category with as many pairs as one step takes, of {total}"
                if self.one_category
                else f"{total} pairs, fewer than one step takes"
            )
            raise UserError(
                f"{KEY}.train has {held}: {deal.batch_size} ({KEY}.batch_size) x {deal.world} (ranks) x "
                f"{deal.accumulate} (trainer.accumulate_grad_batches)"
            )
        if dropped := sum(deal.dropped(group.selection.total) for group in groups):
            rank_zero_info(f"a pass leaves out {dropped} of {total} training pairs, others each time")
        if trainer.current_epoch == 0 and trainer.global_step == 0:  # else a fit that goes on where it was
            self.place = Place()
        self.place.trainer = trainer
        self.place.signature = {
            f"{KEY}.batch_size x ranks": deal.batch_size * deal.world,
            "trainer.accumulate_grad_batches": deal.accumulate,
            f"pairs in {KEY}.train": total,
            f"the fingerprint of {KEY}.train and its filters": self._fingerprint(),
            f"{KEY}.seed": self.seed,
            f"{KEY}.shuffle_window": self.shuffle_window,
            f"{KEY}.one_category": self.one_category,
        }

    def train_dataloader(self) -> PairLoader:
        return self._loader("train", self._train_deal(), self.num_workers, place=self.place)

    def val_dataloader(self) -> PairLoader | list[Any]:
        return [] if self.val is None else self._evaluation_loader("val")

    def test_dataloader(self) -> PairLoader:
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> PairLoader:
        return self._evaluation_loader("test")

    def state_dict(self) -> dict[str, Any]:
        """The place in the training data; Lightning restores this on every resume, a loader's only on some."""
        return self.place.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.place.load_state_dict(state_dict)

    # ---- loaders

    def _ranks(self) -> tuple[int, int]:
        """This rank among those that get different data; ranks that share a model by tensors get the same."""
        sharded = {} if self.trainer is None else (self.trainer.distributed_sampler_kwargs or {})
        return sharded.get("rank", 0), sharded.get("num_replicas", 1)

    def _fingerprint(self) -> str:
        """Differs when other pairs take part; the same for a copy of the shards elsewhere."""
        listed = [(one.nsamples, one.bytes, one.sha256) for one in self._open("train")[0].manifest.shardlist]
        return hashlib.blake2b(repr((listed, self.filter)).encode(), digest_size=6).hexdigest()

    def _train_deal(self) -> Deal:
        accumulate = 1 if self.trainer is None else self.trainer.accumulate_grad_batches
        return Deal(self.batch_size, *self._ranks(), accumulate=accumulate)

    def _groups(self, name: str, deal: Deal, warn: bool = False) -> list[Group]:
        """The training pairs as one group, or one a category that has pairs enough for a step."""
        source, selection = self._open(name)
        if not self.one_category:
            return [Group(selection)]
        groups = []
        for category in self.filter.categories or CATEGORIES:
            found = take(source, replace(self.filter, categories=(category,)))
            if deal.batches(found.total):
                groups.append(Group(found, category))
            elif found.total and warn:
                rank_zero_warn(f"{source.key}: the {found.total} pairs of {category} are too few for a step: left out")
        return groups

    def _evaluation_loader(self, name: str) -> PairLoader:
        source, selection = self._open(name)
        deal = Deal(self.val_batch_size, *self._ranks(), ragged=True)
        if repeated := deal.repeated(selection.total):
            rank_zero_warn(f"{source.key}: {repeated} batches are read twice to keep {deal.world} ranks in step")
        return self._loader(name, deal, min(self.num_workers, len(source.paths)))

    def _loader(self, name: str, deal: Deal, num_workers: int, place: Place | None = None) -> PairLoader:
        training = place is not None
        overfit = getattr(self.trainer, "overfit_batches", 0)  # then every pass is the same
        source, selection = self._open(name)
        stream = PairStream(
            source,
            self._groups(name, deal) if training else [Group(selection)],
            deal,
            PairDecoder(self.seed, self.resolution, self.flip and training),
            shuffle=training and not overfit,
            window=self.shuffle_window,
            skip_bad=self.on_bad_sample == "skip",
        )
        return PairLoader(
            stream, num_workers, torch.cuda.is_available(), place, self.bad_sample_limit, self.bad_samples
        )
