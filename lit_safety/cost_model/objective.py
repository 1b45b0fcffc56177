"""What the cost model is trained on: a contrastive part, anchored by the labels, with a brake on large costs."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from lit_safety.cost_model.losses import anchoring_loss, contrastive_loss, cost_norm, info_nce_loss


class CostLoss(ABC):
    """L = L_con + eta L_anc + rho mean(C^2); a subclass says what L_con is.

    Args:
        anchoring_weight: eta, weight of the anchoring loss, which ties the sign of C to the labels.
        norm_weight: rho, weight of mean(C^2).

    Raises:
        ValueError: if a weight is negative.
    """

    def __init__(self, anchoring_weight: float = 1.0, norm_weight: float = 0.001) -> None:
        if anchoring_weight < 0 or norm_weight < 0:
            raise ValueError(f"weights must not be negative, got {anchoring_weight} and {norm_weight}")
        self.anchoring_weight = anchoring_weight
        self.norm_weight = norm_weight

    @abstractmethod
    def contrast(self, costs: Tensor, adapted: Tensor, harmful: Tensor) -> Tensor:
        """The contrastive loss of each pair (B,): costs (B, 2), adapted features (B, 2, D), labels (B, 2)."""

    def __call__(self, costs: Tensor, adapted: Tensor, harmful: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each pair (B,), and its parts (B,) for the log."""
        parts = {
            "contrastive": self.contrast(costs, adapted, harmful),
            "anchoring": anchoring_loss(costs, harmful),
            "norm": cost_norm(costs),
        }
        loss = parts["contrastive"] + self.anchoring_weight * parts["anchoring"] + self.norm_weight * parts["norm"]
        return loss, parts


class PairwiseCostLoss(CostLoss):
    """Contrast within a pair: the harmful image must cost more than the safe one.

    Args:
        anchoring_weight: eta, weight of the anchoring loss, which ties the sign of C to the labels.
        norm_weight: rho, weight of mean(C^2).
    """

    def contrast(self, costs: Tensor, adapted: Tensor, harmful: Tensor) -> Tensor:
        return contrastive_loss(costs, harmful)


class InfoNCECostLoss(CostLoss):
    """Contrast over the batch: images of one label gather in the adapter's feature space.

    It depends on the whole batch, so batch 8 is not batch 4 accumulated twice.

    Args:
        anchoring_weight: eta, weight of the anchoring loss, which alone trains C here.
        norm_weight: rho, weight of mean(C^2).
        temperature: what cosines are divided by, above 0.

    Raises:
        ValueError: if ``temperature`` is not above 0, or a weight is out of its range.
    """

    def __init__(self, anchoring_weight: float = 1.0, norm_weight: float = 0.001, temperature: float = 0.1) -> None:
        super().__init__(anchoring_weight, norm_weight)
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        if anchoring_weight == 0:
            raise ValueError("anchoring_weight must be above 0: InfoNCE trains the features, only anchoring the cost")
        self.temperature = temperature

    def contrast(self, costs: Tensor, adapted: Tensor, harmful: Tensor) -> Tensor:
        per_image = info_nce_loss(adapted.flatten(0, 1), harmful.flatten(), self.temperature)
        return torch.stack([per_image[0::2], per_image[1::2]]).mean(0)
