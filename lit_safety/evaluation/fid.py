"""Frechet inception distance between two sets of features, with an interval.

The value is torchmetrics'. It is biased upwards in small sets, so it is compared at equal n only, and n and the
feature dimension stand beside it. The interval is a jackknife over `GROUPS` groups of prompts: leaving out a group
changes the bias of every term alike, which cancels; a bootstrap, whose samples hold 63% of the pictures, adds to it.
"""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor, nn

GROUPS = 20
T19 = 2.093024054408263
"""97.5% point of Student's t with GROUPS - 1 degrees of freedom."""
LARGEST = 1024
"""The jackknife is left out when both the pictures and the dimension exceed this: it would take many minutes."""


def fid(features: Tensor, reference: Tensor) -> float:
    """|mu_1 - mu_2|^2 + Tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)) of features (n, d) and (m, d), by torchmetrics in float64."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    network = nn.Identity()
    network.num_features = features.shape[1]  # type: ignore[assignment]  # torchmetrics asks for it
    metric = FrechetInceptionDistance(feature=network).set_dtype(torch.float64)
    metric.update(reference.double(), real=True)
    metric.update(features.double(), real=False)
    return max(0.0, float(metric.compute()))


def left_out(features: Tensor, reference: Tensor, paired: bool) -> Tensor | None:
    """The distance without each group of rows in turn, (GROUPS,); None where there are too few or too many rows.

    Args:
        features: (n, d); row i belongs to group i mod GROUPS.
        reference: (m, d).
        paired: whether row i of both answers the same prompt and seed; then it is left out of both.
    """
    n, d = features.shape
    if n < 2 * GROUPS or (min(n, d) > LARGEST):
        return None
    group = torch.arange(n) % GROUPS
    fixed = None if paired else _moments(reference)
    found = []
    for g in range(GROUPS):
        keep = group != g
        found.append(_frechet(_moments(features[keep]), fixed or _moments(reference[keep])))
    return torch.tensor(found, dtype=torch.float64)


def jackknife(value: float, parts: Tensor | None) -> list[float] | None:
    """95% interval of a value: value -+ t_19 sqrt((G - 1) / G sum_g (v_g - mean v)^2); None without parts."""
    if parts is None:
        return None
    half = T19 * sqrt((GROUPS - 1) / GROUPS * float((parts - parts.mean()).square().sum()))
    return [value - half, value + half]


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and R (min(n, d), d) with R^T R the covariance."""
    mean = features.mean(0)
    centred = (features - mean) / sqrt(len(features) - 1)
    return mean, centred if len(features) <= features.shape[1] else torch.linalg.qr(centred, mode="r").R


def _frechet(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
    """The same distance: Tr (S_1 S_2)^(1/2) is the sum of the singular values of R_1 R_2^T."""
    (m1, r1), (m2, r2) = first, second
    overlap = torch.linalg.svdvals(r1 @ r2.T).sum()
    return float((m1 - m2).square().sum() + r1.square().sum() + r2.square().sum() - 2 * overlap)
