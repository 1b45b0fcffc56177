"""95% intervals for shares and for differences of paired shares: closed forms, so every run gives the same digits.

The bootstrap fails at the shares that matter here. 0 harmful images of 40 give 0 in every resample, so its interval is
[0, 0]; Wilson's is [0, 0.088]. The same happens with two arms that do not differ on any image. A report shows Wilson's
intervals, and its metrics.json also holds the bootstrap's interval of every share.

Errors (images without an answer) widen an interval: it covers every possible answer to them.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, lgamma, log, log1p, sqrt
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


Z = 1.959963984540054
"""97.5% point of the normal distribution."""

DEFINITIONS: dict[str, str] = {
    "intervals": "of shares: Wilson's score interval, 95%; an image without a verdict counts as safe for the lower "
    "and as harmful for the upper end",
    "bootstrap": "of shares: 95% percentile interval of the bootstrap over images, in the limit of all resamples",
    "differences": "paired over prompts and seeds, after minus before; Bonett-Price interval, 95%",
    "quality": "FID: jackknife over 20 groups of prompts, 95%; CLIPScore and preference: mean +- 1.96 standard errors",
}
"""How the intervals of a report are made; stands in metrics.json."""

IN_WORDS = "95% intervals in brackets: Wilson of shares, Bonett-Price of paired differences"
"""The same, short enough for the line below a table."""


def wilson(hits: float, n: float, errors: float = 0) -> tuple[float, float]:
    """Wilson score interval of a share, `hits` of `n` answered images, with `errors` more unanswered.

    Centre (p + z^2/2n) / (1 + z^2/n), half width z sqrt(p(1-p)/n + z^2/4n^2) / (1 + z^2/n). The lower bound counts
    every error as a miss, the upper one every error as a hit. Without any image: (0, 1).
    """
    total = n + errors
    if total == 0:
        return 0.0, 1.0
    return _wilson(hits, total)[0], _wilson(hits + errors, total)[1]


def _wilson(hits: float, n: float) -> tuple[float, float]:
    p, spread = hits / n, Z * Z / n
    centre = (p + spread / 2) / (1 + spread)
    half = Z * sqrt(p * (1 - p) / n + spread / (4 * n)) / (1 + spread)
    # at the ends the bound is exact; rounding would leave 1e-17
    return (0.0 if hits == 0 else centre - half), (1.0 if hits == n else centre + half)


def bootstrap(hits: int, n: int, errors: int = 0) -> tuple[float, float]:
    """95% percentile interval of the bootstrap of a share, in the limit of infinitely many resamples.

    A resample of n yes-or-no answers of which a share p is yes holds Binomial(n, p) of them, so the interval's ends are
    that distribution's 2.5% and 97.5% points over n: no random number is needed. Errors as in `wilson`.
    """
    total = n + errors
    if total == 0:
        return 0.0, 1.0
    return _binomial_point(hits, total, 0.025) / total, _binomial_point(hits + errors, total, 0.975) / total


def _binomial_point(hits: int, n: int, level: float) -> int:
    """The smallest k with P(X <= k) >= level, X ~ Binomial(n, hits / n)."""
    if hits in (0, n):
        return hits
    yes, no, below = log(hits / n), log1p(-hits / n), 0.0
    for k in range(n):
        below += exp(lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1) + k * yes + (n - k) * no)
        if below >= level:
            return k
    return n


def paired_difference(
    before: Sequence[bool | None], after: Sequence[bool | None]
) -> tuple[float | None, tuple[float, float], int]:
    """Difference of two shares over the same images (same prompts, same seeds): after minus before.

    Args:
        before: one answer an image; None where there is none (an error).
        after: the other arm's answers, in the same order.

    Returns:
        The difference over pairs with both answers (None without any), its Bonett-Price interval ("Improved
        confidence intervals for paired differences in proportions", 2012), and the number of such pairs.
        With b pairs that turned true and c that turned false, p = (b+1)/(n+2), q = (c+1)/(n+2):
        p - q +- z sqrt((p + q - (p-q)^2) / (n+2)).
    """
    pairs = [(x, y) for x, y in zip(before, after, strict=True) if x is not None and y is not None]
    n, errors = len(pairs), len(before) - len(pairs)
    gained = sum(y and not x for x, y in pairs)
    lost = sum(x and not y for x, y in pairs)
    low = bonett_price(gained, lost + errors, n + errors)[0]
    high = bonett_price(gained + errors, lost, n + errors)[1]
    return ((gained - lost) / n if n else None), (low, high), n


def bonett_price(gained: float, lost: float, n: float) -> tuple[float, float]:
    """The interval of `paired_difference`, from the counts of pairs that turned true and false."""
    p, q = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = Z * sqrt((p + q - (p - q) ** 2) / (n + 2))
    return max(-1.0, p - q - half), min(1.0, p - q + half)


# A rate from a judge with known error, corrected for the error, with an interval that uses both samples.
#
# A judge has the sensitivity Se (share of harmful images that it finds) and the specificity Sp (share of safe images
# that it calls safe). If P is the true share of harmful images, it calls the share t = P Se + (1 - P)(1 - Sp)
# harmful. Rogan and Gladen ("Estimating prevalence from the results of a screening test", 1978) solve for P: P = (t +
# Sp - 1) / (Se + Sp - 1). Se and Sp are themselves shares of labelled images, so the interval must be wider than that
# of t alone.


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
