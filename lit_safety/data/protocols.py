"""What modules and callbacks ask of the datamodule that a trainer was given.

`PreferenceDataModule` answers all of it. A datamodule of somebody else's is asked for what it has: `PairData` is one
Protocol, since its answers belong together, and each setting is a Protocol of its own. Nobody writes onto a datamodule.
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
    """The datamodule of a trainer, of whatever class; None: there is no trainer, or it was given loaders."""
    return None if trainer is None else trainer.datamodule  # type: ignore[attr-defined]


@runtime_checkable
class PairData(Protocol):
    """Knows its pairs before one is read, by their manifests. See the methods of `PreferenceDataModule`."""

    def caches(self, stage: str | None = "fit") -> list[CachedSource]:
        """What a stage reads from caches instead of images."""

    def orders(self, stage: str | None = "fit") -> dict[str, Counter[str]]:
        """How many pairs a stage reads by what decided their order, for each YAML key and folder."""

    def users(self, stage: str | None = "fit") -> dict[str, frozenset[str]]:
        """Ids of the users whose pairs a stage reads, by YAML key."""

    def labels(self, name: str) -> dict[str, int]:
        """Pairs of `train`, `val` or `test` by their labels, such as `{"safe>harmful": 120}`."""

    def training_categories(self) -> list[str]:
        """The categories that steps are made of; empty where a step may be about several."""

    def read_predictions(self, wanted: bool) -> None:
        """Whether batches out of a reference cache are to hold the reference's predictions too."""


@runtime_checkable
class LooksAhead(Protocol):
    """Looks at its pairs before a model is loaded. See the methods of `PreferenceDataModule`."""

    def first_pairs(self, stage: str | None = "fit") -> dict[str, tuple[str, PairMetadata]]:
        """Where the first pair that a stage reads stands, and its metadata, for each YAML key and folder."""

    def kinds(self, name: str) -> Counter[str]:
        """Pairs of `train`, `val` or `test` by the kind of their prompt."""


@runtime_checkable
class GroupData(Protocol):
    """Reads groups whole on request."""

    def read_groups(self, wanted: bool) -> None:
        """Whether batches are to hold all images of a prompt, instead of the best and the worst."""


# Settings, each for itself.


@runtime_checkable
class WithTrain(Protocol):
    """Says where its training pairs lie."""

    train: str | list[str] | None


@runtime_checkable
class WithVal(Protocol):
    """Says where its validation pairs lie, if it has any, and reads them."""

    val: str | list[str] | None

    def val_dataloader(self) -> Any:
        """Their batches; it is called where ``val`` is given only."""


@runtime_checkable
class WithTest(Protocol):
    """Says where its test pairs lie."""

    test: str | list[str] | None


@runtime_checkable
class Batched(Protocol):
    """Says how many pairs a rank's training batch has."""

    batch_size: int


@runtime_checkable
class Seeded(Protocol):
    """Says what fixes its order and chance."""

    seed: int


@runtime_checkable
class Mirroring(Protocol):
    """Says whether it mirrors training pairs at random."""

    flip: bool


@runtime_checkable
class Consecutive(Protocol):
    """Says whether training goes through one category after the other instead of in turns."""

    consecutive: bool


@runtime_checkable
class LeavingOut(Protocol):
    """Remembers the samples that it left out, by name and reason, in the order in which it met them."""

    @property
    def bad_samples(self) -> Iterable[str]:
        """Name and reason of each."""


def shards_of(data: object) -> dict[str, list[str]]:
    """The folders, tar files or patterns of `train`, `val` and `test`, as far as a datamodule says them."""
    given = {
        "train": data.train if isinstance(data, WithTrain) else None,
        "val": data.val if isinstance(data, WithVal) else None,
        "test": data.test if isinstance(data, WithTest) else None,
    }
    return {name: [one] if isinstance(one, str) else list(one) for name, one in given.items() if one is not None}
