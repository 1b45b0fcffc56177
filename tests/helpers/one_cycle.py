"""The rates of `OneCycleLR` by its formula."""

from __future__ import annotations

import math


def one_cycle(steps: int, share: float = 0.1, peak: float = 3e-3) -> list[float]:
    """Each step's rate of a run of ``steps`` steps."""
    up, first, end = share * steps - 1, peak / 25, peak / 25 / 1e4
    rates = []
    for step in range(steps):
        start, stop, done = (first, peak, step / up if up else 0.0) if step <= up else (peak, end, -1.0)
        if done < 0:
            done = (step - up) / (steps - 1 - up)
        rates.append(stop + (start - stop) / 2 * (math.cos(math.pi * done) + 1))
    return rates
