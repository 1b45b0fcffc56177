"""A rate that a judge of known error found, corrected for that error, with an interval that knows both samples.

A judge of sensitivity Se (share of harmful images that it finds) and specificity Sp (share of safe images that it calls
safe) calls the share t = P Se + (1 - P)(1 - Sp) of images harmful where P are. Rogan and Gladen ("Estimating prevalence
from the results of a screening test", 1978) turn it round: P = (t + Sp - 1) / (Se + Sp - 1). Se and Sp are themselves
shares of labelled images, so the interval must be wider than that of t alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

from lit_safety.core.intervals import Z


@dataclass(frozen=True)
class KnownError:
    """How often a judge was right on labelled images, as counts."""

    found: float
    """Harmful images that it called harmful."""
    harmful: float
    """Harmful images."""
    passed: float
    """Safe images that it called safe."""
    safe: float
    """Safe images."""

    @property
    def youden(self) -> float | None:
        """Se + Sp - 1: 1 for a judge without error, 0 for one that tosses a coin; None: there is no image of a kind."""
        if not self.harmful or not self.safe:
            return None
        return self.found / self.harmful + self.passed / self.safe - 1


def corrected_rate(
    hits: float, n: float, judge: KnownError, errors: float = 0
) -> tuple[float | None, tuple[float, float]]:
    """Rogan and Gladen's estimate of the true share, cut to [0, 1], and its 95% interval.

    The interval holds every P for which the share found, t, lies within z standard deviations of what P, Se and Sp make
    expect: (t - e(P))^2 <= z^2 [e(1 - e) / n + P^2 Se(1 - Se) / m + (1 - P)^2 Sp(1 - Sp) / k], e = P Se + (1 - P)(1 -
    Sp). That is a quadratic inequality in P, so its ends are exact (a score interval, as Wilson's for a judge without
    error; Fieller's for the quotient). Se and Sp enter with one hit and one miss more than were counted, as Lang and
    Reiczigel do ("Confidence limits for prevalence of disease adjusted for estimated sensitivity and specificity",
    2014), else a judge that made no error in its sample would be taken to make none at all.

    Args:
        hits: images that the judge called harmful.
        n: images that it judged.
        judge: its error.
        errors: images without a verdict: the interval holds whatever they would have been.

    Returns: None and (0, 1) where the judge is no better than a coin, or nothing was counted.
    """
    youden = judge.youden
    total = n + errors
    if youden is None or youden <= 0 or total == 0:
        return None, (0.0, 1.0)
    value = None
    if n:
        value = min(1.0, max(0.0, (hits / n + judge.passed / judge.safe - 1) / youden))
    low = _ends(hits / total, total, judge)[0]
    high = _ends((hits + errors) / total, total, judge)[1]
    return value, (low if value is None else min(low, value), high if value is None else max(high, value))


def _ends(share: float, n: float, judge: KnownError) -> tuple[float, float]:
    """The smallest and the largest P in [0, 1] that the share does not rule out."""
    m, k = judge.harmful + 2, judge.safe + 2
    sensitivity, specificity = (judge.found + 1) / m, (judge.passed + 1) / k
    slope, start = sensitivity + specificity - 1, 1 - specificity
    of_sensitivity, of_specificity = sensitivity * (1 - sensitivity) / m, specificity * (1 - specificity) / k
    z2 = Z * Z
    # (share - start - slope P)^2 - z^2 [...] = a P^2 + 2 b P + c <= 0
    a = slope**2 + z2 * (slope**2 / n - of_sensitivity - of_specificity)
    b = -slope * (share - start) - z2 * (slope * (1 - 2 * start) / (2 * n) - of_specificity)
    c = (share - start) ** 2 - z2 * (start * (1 - start) / n + of_specificity)
    if a <= 0:  # the judge is too poor, or was looked at too little, to rule anything out
        return 0.0, 1.0
    root = b * b - a * c
    middle = -b / a
    half = sqrt(root) / a if root > 0 else 0.0
    return min(1.0, max(0.0, middle - half)), max(0.0, min(1.0, middle + half))
