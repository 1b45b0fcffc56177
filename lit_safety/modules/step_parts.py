"""Base classes of the optional parts of a training step. Their subclasses are imported only if a YAML names them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from torch import Tensor

    from lit_safety.data.reading.batch import PairBatch


class Adversary:
    """Disturbs what the network reads of harmful pairs; see `TextAdversary` and `HiddenAdversary`."""

    #: How many found disturbances it remembers.
    replay: int = 0

    def check(self, backbone: Any, cached_text: Any, compiled: bool = False) -> None:
        """Raise `UserError` if it cannot disturb this model. Called after the network was loaded.

        Args:
            backbone: the model.
            cached_text: YAML keys of the shards whose text comes from a cache.
            compiled: whether the denoiser's blocks are compiled.
        """

    def remember(self, moved: Any) -> None:
        """Keep what was found for a batch until `turn`; every rank calls it for every batch."""

    def turn(self, gather: Any) -> None:
        """Called after an optimizer step: from now on the findings of all ranks in this step are remembered.

        Args:
            gather: a tensor of this rank -> those of all ranks, joined along the first dimension.
        """

    def state_dict(self) -> dict[str, Any]:
        """Its memory, for the checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore ``state``; raises `ValueError` if the state is not from such an adversary."""
        if state:
            raise ValueError(f"{type(self).__name__} remembers nothing, but the checkpoint holds {', '.join(state)}")


class Retain:
    """Says how the gradient of the anchor terms is combined with that of the rest; see `ProjectRetain`."""


class Anchors:
    """A loss term besides the pairs that holds the policy to the reference; see `PromptAnchors`."""

    def prepare(self, module: Any, trainer: Trainer) -> None:
        """Called once on all ranks when a fit starts."""
        raise NotImplementedError

    def loss(self, module: Any, batch: PairBatch) -> Tensor:
        """A scalar that is added to the loss of a batch."""
        raise NotImplementedError
