"""What a module asks of anchors; those that there are lie in files of their own, imported when a YAML names them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from torch import Tensor

    from lit_safety.data.reading.batch import PairBatch


class Anchors:
    """Holds the policy to the reference beside the pairs. `PromptAnchors` does, on harmless prompts."""

    def prepare(self, module: Any, trainer: Trainer) -> None:
        """Once, when a fit starts; all ranks call it."""
        raise NotImplementedError

    def loss(self, module: Any, batch: PairBatch) -> Tensor:
        """What is added to the loss of a batch, a scalar."""
        raise NotImplementedError
