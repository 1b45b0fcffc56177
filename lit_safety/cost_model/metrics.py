"""Calibration (Platt scaling on validation images, which makes sigmoid(C) a probability) and figures of a cost
model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_auroc, binary_calibration_error

from lit_safety.core.categories import CATEGORIES


def smoothed_targets(harmful: Tensor) -> Tensor:
    """Platt's targets: (N+ + 1) / (N+ + 2) of a harmful, 1 / (N- + 2) of a safe image; labels (N,) in {0, 1}.

    With targets of 1 and 0, costs that separate perfectly would have the best temperature 0, and every probability
    would be exactly 0 or 1, which a finite validation set cannot prove.
    """
    positives, negatives = harmful.sum(), (1 - harmful).sum()
    return torch.where(harmful == 1, (positives + 1) / (positives + 2), 1 / (negatives + 2))


def not_calibrated(raw: Tensor, harmful: Tensor) -> str | None:
    """Why `fit_calibration` cannot fit to these costs (N,) and labels (N,), in words; None: it can."""
    known = ~harmful.isnan()
    raw, harmful = raw[known], harmful[known]
    if len(raw) == 0:
        return "all labels are unknown"
    if harmful.min() == harmful.max():
        return f"all {len(raw)} known labels are {'harmful' if harmful[0] == 1 else 'safe'}"
    return "all labelled images have the same cost" if raw.min() == raw.max() else None


def fit_calibration(raw: Tensor, harmful: Tensor) -> tuple[float, float]:
    """Temperature T and bias b of C = (raw + b) / T that minimise the negative log likelihood of the labels.

    Platt (1999) as temperature and bias (Guo et al., arXiv 1706.04599, use only T). The bias moves the border to the
    cost at which harm has a probability of 50%, so the sign of C keeps its meaning. T > 0: the order of images never
    changes.

    Args:
        raw: costs (N,), not calibrated.
        harmful: labels (N,): 1, 0, or nan for unknown, which is left out.

    Returns:
        (1.0, 0.0), which has no effect, if `not_calibrated` gives a reason.
    """
    if not_calibrated(raw, harmful) is not None:
        return 1.0, 0.0
    known = ~harmful.isnan()
    raw, harmful = raw[known].double().cpu(), harmful[known].double().cpu()
    spread = raw.std()
    scaled, targets = raw / spread, smoothed_targets(harmful)  # so that one starting point works for any scale
    log_slope = torch.zeros((), dtype=torch.float64, requires_grad=True)
    shift = (-scaled.mean()).clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS([log_slope, shift], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(log_slope.exp() * (scaled + shift), targets)
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return float(spread / log_slope.detach().exp()), float(shift.detach() * spread)


# Figures of a cost model on labelled pairs, overall and by category.


ECE_BINS = 15


def ranking_accuracy(costs: Tensor, harmful: Tensor) -> tuple[Tensor, int]:
    """Share of pairs with one harmful and one safe image whose harmful image costs more, and how many such pairs.

    Costs and labels (B, 2), labels 1, 0 or nan; a tie is not a success.
    """
    order = harmful[:, 0] - harmful[:, 1]
    differ = order.abs() == 1
    return ((costs[:, 0] - costs[:, 1]) * order)[differ].gt(0).float().mean(), int(differ.sum())


def image_figures(costs: Tensor, harmful: Tensor) -> dict[str, Tensor]:
    """Sign accuracy, AUROC and expected calibration error of calibrated costs (N,) against labels (N,), all known.

    ``ece`` compares sigmoid(C) with the share of harmful images in 15 equal bins (Guo et al., arXiv 1706.04599).
    AUROC needs both labels, and is left out if one is missing.
    """
    probability = costs.double().sigmoid()  # in single precision it is 1 for all costs above 17
    found = {"sign_accuracy": ((costs > 0) == (harmful == 1)).float().mean()}
    if harmful.min() != harmful.max():
        found["auroc"] = binary_auroc(probability, harmful.long(), validate_args=False)
    found["ece"] = binary_calibration_error(probability, harmful.long(), n_bins=ECE_BINS, validate_args=False)
    return found


def cost_figures(costs: Tensor, harmful: Tensor, about: Tensor) -> dict[str, Tensor]:
    """``ranking_accuracy``, ``sign_accuracy``, ``auroc`` and ``ece``, and each of them as ``NAME/CATEGORY``.

    A figure without any image or pair is left out.

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
    """All costs, labels and categories of an evaluation, over all ranks."""

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
