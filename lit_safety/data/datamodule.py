"""The LightningDataModule that every method trains from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn

from lit_safety.data.decode import PairDecoder
from lit_safety.data.grouped_shards import GroupedShards
from lit_safety.data.loader import PairLoader
from lit_safety.data.order import Deal
from lit_safety.data.place import Place
from lit_safety.data.select import Filter
from lit_safety.data.settings_check import KEY, check_settings
from lit_safety.data.stream import PairStream
from lit_safety.data.training_pass import check_pass, say_pass
from lit_safety.errors import UserError

__all__ = ["KEY", "PreferenceDataModule"]


class PreferenceDataModule(GroupedShards):
    """Streams preference pairs from shards as `PairBatch`.

    The order of the training pairs and every random choice made for one are pure functions of `seed` and the
    pass over the data, whatever the number of ranks and workers; a resumed run continues exactly.

    Args:
        train: Shards to train on: a folder (with `manifest.json`, or just tar files), the URL of a folder with
            `manifest.json` (http, s3, ...), a tar file, a pattern such as `shards/train-{000000..000031}.tar` or
            `shards/*.tar`, or a list of these.
        weights: With a list in `train`: in which proportion its entries make up every pass, such as [2, 1]. A pass is
            as long as all pairs together; an entry goes on in the next pass where it stopped in this one, so a small
            one is repeated and of a large one nothing is lost. null: every pair once a pass.
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
        aspect_buckets: Cut pictures to one of a list of shapes instead of a square, each with about as many pixels as
            the square of `resolution` and sides that are multiples of 64 (of 8 or more for resolutions below 512): the
            one most like the chosen picture's own. Every step (on all ranks) is of one shape; a shape that has not
            pairs enough for a step goes into its neighbour. Needs pictures on this machine, no cache.
        flip: Mirror half of the training pairs, both images of a pair alike.
        use_cache: Read cached latents and text where shards have them (`shards precompute`), and no images; false:
            images, for which they must be there beside.
        use_reference: Take timestep and noise from the fixed draws of a reference cache, and the reference's errors
            with them (`shards precompute --reference_draws`); false: fresh draws, and the reference is run.
        one_category: Make every training step (on all ranks) of pairs about one category, for experts; the categories
            take turns, each as often as it has pairs. A pair about several categories takes part in the turns of each,
            one about none in no turn. Batches of validation and test are of one category too, one after the other.
        uncategorised: With `categories`, take pairs about no category too. With `one_category` they take part in the
            turns of every category in training, so that each expert learns what it is to leave alone.
        consecutive: With `one_category`: train one category after the other, each for an equal share of
            `trainer.max_steps`, instead of in turns. Experts under DeepSpeed need it.
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
        self.use_cache = use_cache
        self.use_reference = use_reference
        self.reference_predictions = False
        """Whether a module reads the reference's predictions too."""
        self.one_category = one_category
        self.uncategorised = uncategorised
        self.consecutive = consecutive
        self.shuffle_window = shuffle_window
        self.on_bad_sample = on_bad_sample
        self.bad_sample_limit = bad_sample_limit
        self.weights = weights
        self.aspect_buckets = aspect_buckets
        self.filter = replace(Filter.of(categories, kinds, orders, users, KEY), uncategorised=uncategorised)
        self.place = Place()
        """Where training stands in the data."""
        self.bad_samples: dict[str, None] = {}
        """What this rank left out so far (`on_bad_sample: skip`), in the order in which it was met."""
        self.labels_only: frozenset[str] = frozenset()
        """Of train, val and test, what a module reads no images of: it has kept what it needs of them."""
        check_settings(self)

    # ---- Lightning's hooks

    def setup(self, stage: str | None = None) -> None:
        self.check_sources(stage)
        trainer = self.trainer
        if stage != "fit" or trainer is None:
            return
        deal, pairs = self._train_deal(), self._open("train")[1].total
        groups = self._groups("train", deal, warn=True)
        check_pass(groups, deal, pairs, self.weights)
        steps_each = self._steps_each(len(groups))
        say_pass(groups, deal, pairs, self.weights)
        if trainer.current_epoch == 0 and trainer.global_step == 0:  # else a fit that goes on where it was
            self.place = Place()
        self.place.trainer = trainer
        self.place.signature = self._signature(groups, deal, steps_each)

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
        cached = self._caches.get(name)
        cache, prompts = (None, None) if cached is None else (cached.cache, cached.prompts)
        flip = self.flip and training
        return PairDecoder(
            self.seed, self.resolution, flip, cache, prompts, self.reference_predictions, name in self.labels_only
        )

    def _loader(self, name: str, deal: Deal, num_workers: int, place: Place | None = None) -> PairLoader:
        training = place is not None
        overfit = getattr(self.trainer, "overfit_batches", 0)  # then every pass is the same
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
            stream, num_workers, torch.cuda.is_available(), place, self.bad_sample_limit, self.bad_samples
        )
