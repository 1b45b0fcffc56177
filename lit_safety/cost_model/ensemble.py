"""A pessimistic cost: mean + k standard deviations over several cost models, as in LAMBDA (arXiv 2201.09802).

Cost models from fits with different seeds agree on images like their training images and disagree on others. If they
disagree, the cost is higher than their mean, so that a constraint also holds with their errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from lit_safety.core.errors import UserError
from lit_safety.cost_model.network import CostScorer

if TYPE_CHECKING:
    from PIL.Image import Image


def pessimistic(costs: Tensor, pessimism: float) -> Tensor:
    """mean + k std over M heads, costs (M, B) -> (B,); the variance is divided by M."""
    return costs.mean(0) + pessimism * costs.std(0, correction=0)


class CostEnsemble:
    """Several cost models that are used like one `CostScorer`.

    Args:
        scorers: calibrated cost models, such as fits of one recipe with several seeds. Heads on the same CLIP share one
            pass through it.
        pessimism: k, standard deviations that are added to the mean.

    Raises:
        ValueError: there is no scorer, or ``pessimism`` is negative.
    """

    def __init__(self, scorers: Sequence[CostScorer], pessimism: float = 1.0) -> None:
        if not scorers:
            raise ValueError("an ensemble needs at least one cost model")
        if not 0 <= pessimism < float("inf"):  # nan compares as false
            raise ValueError(f"pessimism must not be negative, got {pessimism}")
        self.scorers = list(scorers)
        self.pessimism = pessimism
        self._shared = all(
            one.tower.features == scorers[0].tower.features and one.tower.sha256 == scorers[0].tower.sha256
            for one in scorers
        )
        if self._shared:
            for one in scorers[1:]:
                one.tower = scorers[0].tower

    def to(self, device: torch.device | str) -> Self:
        """Move all networks."""
        for one in self.scorers:
            one.to(device)
        return self

    @property
    def device(self) -> torch.device:
        return self.scorers[0].device

    @torch.no_grad()
    def costs(self, images: Sequence[Image] | Tensor) -> Tensor:
        """Pessimistic costs, float32 (B,). Arguments as `CostScorer.costs`."""
        if not self._shared:
            return pessimistic(torch.stack([one.costs(images) for one in self.scorers]), self.pessimism)
        first = self.scorers[0]
        if isinstance(images, Tensor):
            features = first.tower(images)
        elif not images:
            return torch.empty(0, device=self.device)
        else:
            features = first.features(images)
        heads = [(one.adapter(features) + one.bias) / one.temperature for one in self.scorers]
        return pessimistic(torch.stack(heads), self.pessimism)


def load_ensemble(folders: Sequence[str], pessimism: float, device: str = "cpu") -> CostEnsemble:
    """The cost models in these folders as one.

    Raises:
        UserError: one does not load, or is given twice.
    """
    from lit_safety.cost_model.files import load_cost_model

    if twice := [one for one in folders if list(folders).count(one) > 1]:
        raise UserError(f"{twice[0]}: is given twice in an ensemble of cost models; give each once")
    return CostEnsemble([load_cost_model(one, device) for one in folders], pessimism)
