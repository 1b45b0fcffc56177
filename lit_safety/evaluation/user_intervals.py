"""95% intervals for shares of pictures that come in groups: a user's pictures resemble each other.

A model that misreads one user fails on many of that user's pictures at once. The usual interval, which takes every
picture for itself, would be too narrow. So the number of pictures is replaced by the effective one, n / deff, before
Wilson's or Bonett and Price's formula (Korn and Graubard, "Confidence intervals for proportions with small expected
number of positive counts estimated from survey data", 1998; Franco et al., 2019):

    deff = max(1, v / s)
    v = k / (k - 1) * sum_i (sum_j y_ij - mean * m_i)^2 / n^2      variance of the mean over k users, m_i pictures each
    s = sum_ij (y_ij - mean)^2 / (n (n - 1))                       the same if each picture stood for itself

With one user, or where all pictures agree (s = 0), deff is 1: there is nothing to estimate it from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lit_safety.evaluation.intervals import bonett_price, wilson

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Share:
    """A share, or a difference of two, with all that it was counted from."""

    value: float | None
    """None: nothing was answered."""
    interval: tuple[float, float]
    n: int
    """Answered pictures (pairs of pictures)."""
    errors: int
    users: int
    hits: int | None = None
    """Of a share."""
    deff: float = 1.0

    def describe(self) -> dict[str, float | int | list[float] | None]:
        """As it stands in metrics.json."""
        found: dict[str, float | int | list[float] | None] = {"value": self.value, "interval": list(self.interval)}
        return found | ({} if self.hits is None else {"hits": self.hits}) | {
            "n": self.n, "errors": self.errors, "users": self.users, "deff": round(self.deff, 6),
        }  # fmt: skip


def share(answers: Sequence[bool | None], users: Sequence[str]) -> Share:
    """The share of true answers; None is an error, and the interval covers whatever it would have been.

    Args:
        answers: one a picture.
        users: whose picture it is, in the same order.
    """
    given = [(float(answer), user) for answer, user in zip(answers, users, strict=True) if answer is not None]
    n, errors = len(given), len(answers) - len(given)
    hits = int(sum(value for value, _ in given))
    p = hits / n if n else 0.0
    deff = _deff([v for v, _ in given], [u for _, u in given], p * (1 - p) / (n - 1) if n > 1 else 0.0)
    interval = wilson(hits / deff, n / deff, errors / deff)
    return Share(hits / n if n else None, interval, n, errors, len(set(users)), hits, deff)


def paired_share(before: Sequence[bool | None], after: Sequence[bool | None], users: Sequence[str]) -> Share:
    """Difference of two shares over the same prompts and seeds, after minus before; see `paired_difference`."""
    pairs = list(zip(before, after, users, strict=True))
    changes = [(float(y) - float(x), user) for x, y, user in pairs if x is not None and y is not None]
    n, errors = len(changes), len(pairs) - len(changes)
    gained, lost = (sum(change == sign for change, _ in changes) for sign in (1.0, -1.0))
    mean = (gained - lost) / n if n else 0.0
    alone = ((gained + lost) / n - mean**2) / (n - 1) if n > 1 else 0.0
    deff = _deff([c for c, _ in changes], [u for _, u in changes], alone)
    low = bonett_price(gained / deff, (lost + errors) / deff, (n + errors) / deff)[0]
    high = bonett_price((gained + errors) / deff, lost / deff, (n + errors) / deff)[1]
    return Share(mean if n else None, (low, high), n, errors, len(set(users)), deff=deff)


def _deff(values: Sequence[float], users: Sequence[str], alone: float) -> float:
    """How many pictures of a group are worth as much as one that stands for itself; `alone` is s."""
    groups: dict[str, list[float]] = {}
    for value, user in zip(values, users, strict=True):
        groups.setdefault(user, []).append(value)
    if len(groups) < 2 or alone <= 0:
        return 1.0
    mean, k = sum(values) / len(values), len(groups)
    spread = sum((sum(group) - mean * len(group)) ** 2 for group in groups.values())
    return max(1.0, k / (k - 1) * spread / len(values) ** 2 / alone)
