"""What a step may be given by class in YAML. The classes themselves are read where a YAML names them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from torch import Tensor

    from lit_safety.data.reading.batch import PairBatch


class Adversary:
    """Disturbs what the network reads of harmful pairs; see `TextAdversary` and `HiddenAdversary`."""

    #: How many of the disturbances that it found it remembers.
    replay: int = 0

    def check(self, backbone: Any, cached_text: Any, compiled: bool = False) -> None:
        """Whether it can disturb this model; `UserError` if not. Called when the network is there.

        Args:
            backbone: the model.
            cached_text: YAML keys of the shards whose text comes from a cache.
            compiled: whether the denoiser's blocks are.
        """

    def remember(self, moved: Any) -> None:
        """Keep what was found for a batch until `turn`; every rank calls it for every batch."""

    def turn(self, gather: Any) -> None:
        """An optimizer step is over: what every rank found in it is remembered from now on.

        Args:
            gather: a tensor of this rank -> those of all ranks, joined along the first dimension.
        """

    def state_dict(self) -> dict[str, Any]:
        """What it remembers, for the checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``; `ValueError` if it is not one of this adversary's."""
        if state:
            raise ValueError(f"{type(self).__name__} remembers nothing, and the checkpoint holds {', '.join(state)}")


class Retain:
    """Says how the gradient of what keeps a model meets that of the rest; see `ProjectRetain`."""


class Anchors:
    """Holds the policy to the reference beside the pairs. `PromptAnchors` does, on harmless prompts."""

    def prepare(self, module: Any, trainer: Trainer) -> None:
        """Once, when a fit starts; all ranks call it."""
        raise NotImplementedError

    def loss(self, module: Any, batch: PairBatch) -> Tensor:
        """What is added to the loss of a batch, a scalar."""
        raise NotImplementedError
