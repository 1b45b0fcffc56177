"""What modules and callbacks need from the datamodule of a trainer.

`PreferenceDataModule` has all of it. Another datamodule may have a part: `PairData` is one Protocol, because its
methods belong together, and each setting is its own Protocol. Nobody sets attributes of a datamodule.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from lit_safety.data.cache.sources import CachedSource
    from lit_safety.data.format.sample import PairMetadata


def datamodule_of(trainer: Trainer | None) -> object:
    """The datamodule of a trainer, of any class; None: there is no trainer, or it was given loaders."""
    return None if trainer is None else trainer.datamodule  # type: ignore[attr-defined]


@runtime_checkable
class PairData(Protocol):
    """Knows its pairs from their manifests, before any pair is read. See the methods of `PreferenceDataModule`."""

    def caches(self, stage: str | None = "fit") -> list[CachedSource]:
        """The caches that a stage reads instead of images."""

    def orders(self, stage: str | None = "fit") -> dict[str, Counter[str]]:
        """How many pairs a stage reads by what decided their order, for each YAML key and folder."""

    def users(self, stage: str | None = "fit") -> dict[str, frozenset[str]]:
        """Ids of the users whose pairs a stage reads, by YAML key."""

    def labels(self, name: str) -> dict[str, int]:
        """Pairs of `train`, `val` or `test` by their labels, such as `{"safe>harmful": 120}`."""

    def training_categories(self) -> list[str]:
        """The categories of the steps; empty if a step may hold several categories."""

    def read_predictions(self, wanted: bool) -> None:
        """Whether batches from a reference cache must also hold the reference's predictions."""


@runtime_checkable
class LooksAhead(Protocol):
    """Can show its pairs before a model is loaded. See the methods of `PreferenceDataModule`."""

    def first_pairs(self, stage: str | None = "fit") -> dict[str, tuple[str, PairMetadata]]:
        """Place and metadata of the first pair that a stage reads, for each YAML key and folder."""

    def kinds(self, name: str) -> Counter[str]:
        """Pairs of `train`, `val` or `test` by the kind of their prompt."""


@runtime_checkable
class GroupData(Protocol):
    """Reads groups whole on request."""

    def read_groups(self, wanted: bool) -> None:
        """Whether batches are to hold all images of a prompt, instead of the best and the worst."""


@runtime_checkable
class Rounds(Protocol):
    """Deals the images of rounds in which a policy draws. See `RoundData`."""

    prompts_per_round: int
    images_per_prompt: int
    passes: int
    seed: int


# Settings, one Protocol each.


@runtime_checkable
class WithTrain(Protocol):
    """States where its training pairs are."""

    train: str | list[str] | None


@runtime_checkable
class WithVal(Protocol):
    """States where its validation pairs are, if it has any, and reads them."""

    val: str | list[str] | None

    def val_dataloader(self) -> Any:
        """Their batches; only called if ``val`` is given."""


@runtime_checkable
class WithTest(Protocol):
    """States where its test pairs are."""

    test: str | list[str] | None


@runtime_checkable
class Batched(Protocol):
    """States how many pairs a rank's training batch has."""

    batch_size: int


@runtime_checkable
class Seeded(Protocol):
    """States the seed of its order and random choices."""

    seed: int


@runtime_checkable
class Mirroring(Protocol):
    """States whether it mirrors training pairs at random."""

    flip: bool


@runtime_checkable
class Consecutive(Protocol):
    """States whether categories are trained one after the other instead of in turns."""

    consecutive: bool


@runtime_checkable
class LeavingOut(Protocol):
    """Remembers the samples that it left out, by name and reason, in the order of reading."""

    @property
    def bad_samples(self) -> Iterable[str]:
        """Name and reason of each."""


def shards_of(data: object) -> dict[str, list[str]]:
    """The folders, tar files or patterns of `train`, `val` and `test` that a datamodule states."""
    given = {
        "train": data.train if isinstance(data, WithTrain) else None,
        "val": data.val if isinstance(data, WithVal) else None,
        "test": data.test if isinstance(data, WithTest) else None,
    }
    return {name: [one] if isinstance(one, str) else list(one) for name, one in given.items() if one is not None}
