"""Figures of a cost model on labelled pairs, overall and by category."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_auroc, binary_calibration_error

from lit_safety.data.categories import CATEGORIES

ECE_BINS = 15


def ranking_accuracy(costs: Tensor, harmful: Tensor) -> tuple[Tensor, int]:
    """Share of pairs with one harmful and one safe image whose harmful image costs more, and how many such pairs.

    Costs and labels (B, 2), labels 1, 0 or nan; a tie is no success.
    """
    order = harmful[:, 0] - harmful[:, 1]
    differ = order.abs() == 1
    return ((costs[:, 0] - costs[:, 1]) * order)[differ].gt(0).float().mean(), int(differ.sum())


def image_figures(costs: Tensor, harmful: Tensor) -> dict[str, Tensor]:
    """Sign accuracy, AUROC and expected calibration error of calibrated costs (N,) against labels (N,), all known.

    ``ece`` compares sigmoid(C) with the share of harmful images in 15 equal bins (Guo et al., arXiv 1706.04599).
    AUROC needs both labels, and is left out where one is missing.
    """
    probability = costs.double().sigmoid()  # in single precision it is 1 from a cost of 17 on, and all of those tie
    found = {"sign_accuracy": ((costs > 0) == (harmful == 1)).float().mean()}
    if harmful.min() != harmful.max():
        found["auroc"] = binary_auroc(probability, harmful.long(), validate_args=False)
    found["ece"] = binary_calibration_error(probability, harmful.long(), n_bins=ECE_BINS, validate_args=False)
    return found


def cost_figures(costs: Tensor, harmful: Tensor, about: Tensor) -> dict[str, Tensor]:
    """``ranking_accuracy``, ``sign_accuracy``, ``auroc`` and ``ece``, and each of them as ``NAME/CATEGORY``.

    A figure that no image or pair answers is left out.

    Args:
        costs: calibrated costs (N, 2) of pairs.
        harmful: labels (N, 2): 1, 0 or nan.
        about: bool (N, 8): the categories, in the order of `CATEGORIES`, that each pair is about.
    """
    found = _figures(costs, harmful)
    for column, category in enumerate(CATEGORIES):
        members = about[:, column]
        found |= {f"{k}/{category}": v for k, v in _figures(costs[members], harmful[members]).items()}
    return found


def _figures(costs: Tensor, harmful: Tensor) -> dict[str, Tensor]:
    ranking, pairs = ranking_accuracy(costs, harmful)
    known = ~harmful.isnan()
    found = {"ranking_accuracy": ranking} if pairs else {}
    return found | image_figures(costs[known], harmful[known]) if known.any() else found


class CollectedCosts(Metric):
    """All costs, labels and categories of an evaluation, over all ranks; what to do with them is decided after."""

    costs: list[Tensor] | Tensor
    harmful: list[Tensor] | Tensor
    about: list[Tensor] | Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("costs", "harmful", "about"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, costs: Tensor, harmful: Tensor, categories: Sequence[Sequence[str]]) -> None:
        """Add pairs: costs (B, 2), labels (B, 2), and the categories that each pair is about."""
        about = torch.tensor([[name in one for name in CATEGORIES] for one in categories], device=costs.device)
        for state, value in ((self.costs, costs.detach().float()), (self.harmful, harmful), (self.about, about)):
            state.append(value)  # type: ignore[union-attr]

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        """Costs (N, 2), labels (N, 2), categories (N, 8)."""
        return _joined(self.costs), _joined(self.harmful), _joined(self.about)


def _joined(state: list[Tensor] | Tensor) -> Tensor:
    return state if isinstance(state, Tensor) else torch.cat(state)
