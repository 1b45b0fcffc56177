"""A rate from a judge with known error, corrected for the error, with an interval that uses both samples.

A judge of sensitivity Se (share of harmful images that it finds) and specificity Sp (share of safe images that it calls
safe) calls the share t = P Se + (1 - P)(1 - Sp) of images harmful if P is the true share. Rogan and Gladen ("Estimating
prevalence from the results of a screening test", 1978) solve for P: P = (t + Sp - 1) / (Se + Sp - 1). Se and Sp are
themselves shares of labelled images, so the interval must be wider than that of t alone.
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
        """Se + Sp - 1: 1 for a judge without error, 0 for a random judge; None: harmful or safe images are missing."""
        if not self.harmful or not self.safe:
            return None
        return self.found / self.harmful + self.passed / self.safe - 1


def corrected_rate(
    hits: float, n: float, judge: KnownError, errors: float = 0
) -> tuple[float | None, tuple[float, float]]:
    """Rogan and Gladen's estimate of the true share, limited to [0, 1], and its 95% interval.

    The interval contains every P for which the observed share t is within z standard deviations of its expected value:
    (t - e(P))^2 <= z^2 [e(1 - e) / n + P^2 Se(1 - Se) / m + (1 - P)^2 Sp(1 - Sp) / k], e = P Se + (1 - P)(1 - Sp). This
    is a quadratic inequality in P, so its ends are exact (a score interval, like Wilson's for a judge without error,
    and Fieller's for the quotient). Se and Sp use one hit and one miss more than were counted, as in Lang and Reiczigel
    ("Confidence limits for prevalence of disease adjusted for estimated sensitivity and specificity", 2014). Otherwise
    a judge without errors in its sample would count as never wrong.

    Args:
        hits: images that the judge called harmful.
        n: images that it judged.
        judge: the judge's counts on labelled images.
        errors: images without a verdict: the interval includes all possible verdicts for them.

    Returns: None and (0, 1) if the judge is not better than random, or nothing was counted.
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
    """The smallest and the largest P in [0, 1] that the share does not exclude."""
    m, k = judge.harmful + 2, judge.safe + 2
    sensitivity, specificity = (judge.found + 1) / m, (judge.passed + 1) / k
    slope, start = sensitivity + specificity - 1, 1 - specificity
    of_sensitivity, of_specificity = sensitivity * (1 - sensitivity) / m, specificity * (1 - specificity) / k
    z2 = Z * Z
    # (share - start - slope P)^2 - z^2 [...] = a P^2 + 2 b P + c <= 0
    a = slope**2 + z2 * (slope**2 / n - of_sensitivity - of_specificity)
    b = -slope * (share - start) - z2 * (slope * (1 - 2 * start) / (2 * n) - of_specificity)
    c = (share - start) ** 2 - z2 * (start * (1 - start) / n + of_specificity)
    if a <= 0:  # the judge is too weak, or has too few labelled images, to exclude anything
        return 0.0, 1.0
    root = b * b - a * c
    middle = -b / a
    half = sqrt(root) / a if root > 0 else 0.0
    return min(1.0, max(0.0, middle - half)), max(0.0, min(1.0, middle + half))
