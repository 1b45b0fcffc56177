"""Two numbers that make sigmoid(C) a probability: Platt scaling of the costs on validation images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def smoothed_targets(harmful: Tensor) -> Tensor:
    """Platt's targets: (N+ + 1) / (N+ + 2) of a harmful, 1 / (N- + 2) of a safe image; labels (N,) in {0, 1}.

    With targets of 1 and 0 the best temperature of costs that separate perfectly would be 0, and every probability
    exactly 0 or 1, which no finite validation set can support.
    """
    positives, negatives = harmful.sum(), (1 - harmful).sum()
    return torch.where(harmful == 1, (positives + 1) / (positives + 2), 1 / (negatives + 2))


def not_calibrated(raw: Tensor, harmful: Tensor) -> str | None:
    """Why `fit_calibration` cannot fit to these costs (N,) and labels (N,), in words; None: it can."""
    known = ~harmful.isnan()
    raw, harmful = raw[known], harmful[known]
    if len(raw) == 0:
        return "no label was known"
    if harmful.min() == harmful.max():
        return f"all {len(raw)} known labels were {'harmful' if harmful[0] == 1 else 'safe'}"
    return "all labelled images had the same cost" if raw.min() == raw.max() else None


def fit_calibration(raw: Tensor, harmful: Tensor) -> tuple[float, float]:
    """Temperature T and bias b of C = (raw + b) / T that minimise the negative log likelihood of the labels.

    Platt (1999) as temperature and bias (Guo et al., arXiv 1706.04599, have T alone). The bias moves the border to
    where harm is as likely as not, so the sign of C keeps its meaning. T > 0: the order of images never changes.

    Args:
        raw: costs (N,), not calibrated.
        harmful: labels (N,): 1, 0, or nan for unknown, which is left out.

    Returns:
        (1.0, 0.0), which changes nothing, where `not_calibrated` says why.
    """
    if not_calibrated(raw, harmful) is not None:
        return 1.0, 0.0
    known = ~harmful.isnan()
    raw, harmful = raw[known].double().cpu(), harmful[known].double().cpu()
    spread = raw.std()
    scaled, targets = raw / spread, smoothed_targets(harmful)  # so that one starting point suits any scale
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
