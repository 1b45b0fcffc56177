"""What the batches of the given shards are made of, as far as can be known before one is read."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray

from lit_safety.data.buckets import bucket_groups
from lit_safety.data.categories import CATEGORIES
from lit_safety.data.given_shards import GivenShards
from lit_safety.data.order import Deal
from lit_safety.data.picture_sizes import chosen_sizes
from lit_safety.data.plan import Group
from lit_safety.data.select import take
from lit_safety.data.settings_check import KEY
from lit_safety.errors import UserError


class GroupedShards(GivenShards):
    """Which pairs are batched with each other, how batches are dealt to ranks and steps, and what tells them apart from
    those of other settings.

    Its attributes are `PreferenceDataModule`'s arguments.
    """

    batch_size: int
    seed: int
    shuffle_window: int
    one_category: bool
    uncategorised: bool
    consecutive: bool
    weights: list[float] | None

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[str, list[NDArray[np.int64]]] = {}

    # ---- how batches are dealt

    def _ranks(self) -> tuple[int, int]:
        """This rank among those that get different data; ranks that share a model by tensors get the same."""
        sharded = {} if self.trainer is None else (self.trainer.distributed_sampler_kwargs or {})
        return sharded.get("rank", 0), sharded.get("num_replicas", 1)

    def _train_deal(self) -> Deal:
        accumulate = 1 if self.trainer is None else self.trainer.accumulate_grad_batches
        return Deal(self.batch_size, *self._ranks(), accumulate=accumulate)

    def _steps_each(self, categories: int) -> int | None:
        """How many steps each category is trained for where they come one after the other."""
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

    def training_categories(self) -> list[str]:
        """The categories that steps are made of, in the order of their turns where they are consecutive.

        Empty without `one_category`.

        Raises:
            UserError: there are no shards to train on.
        """
        if self.train is None:
            raise UserError(f"{KEY}.train is not given; name a folder of shards to train on")
        groups = self._groups("train", self._train_deal()) if self.one_category else []
        return [group.category for group in groups if group.category is not None]

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
        """One group for each shape of picture that has pairs enough for a step."""
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
        """What must be equal to resume in the middle of a pass over the training pairs: `Place.signature`."""
        signature: dict[str, int | bool | str] = {
            f"{KEY}.batch_size x ranks": deal.batch_size * deal.world,
            "trainer.accumulate_grad_batches": deal.accumulate,
            f"pairs in {KEY}.train": self._open("train")[1].total,
            f"the fingerprint of {KEY}.train and its filters": self._fingerprint(),
            f"{KEY}.seed": self.seed,
            f"{KEY}.shuffle_window": self.shuffle_window,
            f"{KEY}.one_category": self.one_category,
            f"{KEY}.uncategorised": self.uncategorised,
        }
        if self.aspect_buckets:
            signature[f"{KEY}.resolution with {KEY}.aspect_buckets"] = str(self.resolution)
        if steps_each is not None:
            signature["the steps of one category"] = steps_each
        if self.weights is not None:
            weights, sizes = [float(one) for one in self.weights], [group.selection.total for group in groups]
            signature[f"{KEY}.weights and the pairs of each"] = f"{weights} of {sizes}"
        return signature

    def _fingerprint(self) -> str:
        """Differs when other pairs take part, or others together; the same for a copy of the shards elsewhere."""
        listed = [(one.nsamples, one.bytes, one.sha256) for one in self._open("train")[0].manifest.shardlist]
        parts = (listed, self.filter, "shapes") if self.aspect_buckets else (listed, self.filter)
        return hashlib.blake2b(repr(parts).encode(), digest_size=6).hexdigest()
