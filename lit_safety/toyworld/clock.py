"""Training by wall time: what has been spent of a budget, over interruptions."""

import time


class Budget:
    """A training's minutes. `fraction` goes from 0 to 1, and schedules are functions of it."""

    def __init__(self, minutes: float, spent: float = 0.0) -> None:
        """`spent`: seconds that earlier, interrupted runs used."""
        self.seconds = 60 * minutes
        self._start = time.monotonic() - spent

    @property
    def spent(self) -> float:
        """Seconds used so far."""
        return time.monotonic() - self._start

    @property
    def fraction(self) -> float:
        """Share of the budget that is used, at most 1."""
        return min(1.0, self.spent / self.seconds) if self.seconds > 0 else 1.0


def decayed(fraction: float, warmup: float = 0.02, hold: float = 0.3) -> float:
    """Learning-rate factor: linear warm-up, constant until `hold`, then a cosine down to 0 at fraction 1."""
    from math import cos, pi

    if fraction < warmup:
        return max(0.02, fraction / warmup)
    if fraction < hold:
        return 1.0
    return 0.5 * (1 + cos(pi * (fraction - hold) / (1 - hold)))
