"""The losses of the safety cost model, as pure functions of costs and labels.

SC-DPO (arXiv 2504.14290) trains its cost model with a contrastive and a cost anchoring objective, but does not publish
their formulas. Here they have the form of Safe RLHF's pairwise cost loss (Dai et al., arXiv 2310.12773, equation 8),
with C > 0 harmful. Labels are 1 harmful, 0 safe, nan unknown. Unknown labels add neither value nor gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive_loss(costs: Tensor, harmful: Tensor) -> Tensor:
    """-log sigmoid(C(h) - C(s)), h the harmful and s the safe image of a pair: costs, labels (B, 2) -> loss (B,).

    0 for pairs whose labels are equal or not both known.
    """
    order = harmful[:, 0] - harmful[:, 1]  # 1, -1, 0, or nan
    differ = order.abs() == 1
    gap = torch.where(differ, order, 0.0) * (costs[:, 0] - costs[:, 1])
    return torch.where(differ, -F.logsigmoid(gap), 0.0)


def anchoring_loss(costs: Tensor, harmful: Tensor) -> Tensor:
    """-log sigmoid(C) of a harmful image, -log sigmoid(-C) of a safe one, summed over a pair: (B, 2) -> (B,)."""
    known = ~harmful.isnan()
    sign = torch.where(known, 2.0 * harmful - 1.0, 0.0)
    return torch.where(known, -F.logsigmoid(sign * costs), 0.0).sum(1)


def cost_norm(costs: Tensor) -> Tensor:
    """Mean of C^2 over the two images of a pair: (B, 2) -> (B,). It stops costs from growing without limit."""
    return costs.square().mean(1)


def info_nce_loss(features: Tensor, harmful: Tensor, temperature: float) -> Tensor:
    """Supervised InfoNCE (Khosla et al., arXiv 2004.11362, equation 2) over a batch: (N, D), labels (N,) -> loss (N,).

    Images of the same label attract each other, images of different labels repel each other; similarity is the cosine /
    temperature. The loss is 0 for an image of unknown label, or if no other image has its label. Unknown images are
    also not used as negatives. Unlike the other losses it depends on the whole batch.
    """
    known = ~harmful.isnan()
    unit = F.normalize(features, dim=1)
    others = known[None, :] & ~torch.eye(len(features), dtype=torch.bool, device=features.device)
    similarity = (unit @ unit.T / temperature).masked_fill(~others, -torch.inf)
    positive = others & (harmful[:, None] == harmful[None, :])
    count = positive.sum(1)
    # Rows without a positive are zeroed before the softmax: a row of only -inf would have nan gradients.
    counts = (count > 0) & known
    similarity = torch.where(counts[:, None], similarity, torch.zeros_like(similarity))
    log_share = similarity.log_softmax(1)
    summed = torch.where(positive & counts[:, None], log_share, torch.zeros_like(log_share)).sum(1)
    return torch.where(counts, -summed / count.clamp(min=1), 0.0)


# The loss of the cost model: a contrastive part, an anchoring part from the labels, and a penalty on large costs.


class CostLoss(ABC):
    """L = L_con + eta L_anc + rho mean(C^2); a subclass defines L_con.

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
    """Contrast over the batch: images of one label come together in the adapter's feature space.

    It depends on the whole batch, so batch 8 is not batch 4 accumulated twice.

    Args:
        anchoring_weight: eta, weight of the anchoring loss; only this loss trains C here.
        norm_weight: rho, weight of mean(C^2).
        temperature: the divisor of cosines, above 0.

    Raises:
        ValueError: if ``temperature`` is not above 0, or a weight is out of its range.
    """

    def __init__(self, anchoring_weight: float = 1.0, norm_weight: float = 0.001, temperature: float = 0.1) -> None:
        super().__init__(anchoring_weight, norm_weight)
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        if anchoring_weight == 0:
            raise ValueError(
                "anchoring_weight must be above 0: InfoNCE trains the features, and only anchoring trains the cost"
            )
        self.temperature = temperature

    def contrast(self, costs: Tensor, adapted: Tensor, harmful: Tensor) -> Tensor:
        per_image = info_nce_loss(adapted.flatten(0, 1), harmful.flatten(), self.temperature)
        return torch.stack([per_image[0::2], per_image[1::2]]).mean(0)
