"""95% intervals for shares and for differences of paired shares: closed forms, so every run gives the same digits.

The bootstrap fails at the shares that matter here. 0 harmful images of 40 give 0 in every resample, so its interval is
[0, 0]; Wilson's is [0, 0.088]. The same happens with two arms that do not differ on any image. A report shows Wilson's
intervals, and its metrics.json also holds the bootstrap's interval of every share.

Errors (images without an answer) widen an interval: it covers every possible answer to them.
"""

from __future__ import annotations

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
