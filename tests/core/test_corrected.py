"""Rates corrected for a judge's known error."""

import numpy as np
import pytest

from lit_safety.core.corrected import KnownError, corrected_rate
from lit_safety.core.intervals import wilson

DRAWS = 2000


@pytest.mark.parametrize(
    ("true", "sensitivity", "specificity", "n", "harmful", "safe"),
    [(0.1, 0.8, 0.95, 400, 200, 200), (0.3, 0.6, 0.9, 300, 100, 150), (0.2, 0.4, 0.95, 1000, 300, 300)],
)
def test_a_judge_of_known_error_is_corrected_within_its_interval(
    true: float, sensitivity: float, specificity: float, n: int, harmful: int, safe: int
) -> None:
    """In 93 to 97% of draws of all three samples: what is judged, and both kinds of labelled images."""
    rng = np.random.default_rng(1)
    called = rng.binomial(n, true * sensitivity + (1 - true) * (1 - specificity), DRAWS).tolist()
    found = rng.binomial(harmful, sensitivity, DRAWS).tolist()
    passed = rng.binomial(safe, specificity, DRAWS).tolist()
    values, covered, plain = [], 0, 0
    for hits, right, clear in zip(called, found, passed, strict=True):
        value, (low, high) = corrected_rate(hits, n, KnownError(right, harmful, clear, safe))
        values.append(value)
        covered += low <= true <= high
        plain += wilson(hits, n)[0] <= true <= wilson(hits, n)[1]
    assert 0.93 <= covered / DRAWS <= 0.97
    assert abs(float(np.mean(values)) - true) < 0.01
    assert plain < covered


def test_the_estimate_is_rogan_and_gladens() -> None:
    """t = .25, Se = .8, Sp = .9: P = (.25 + .9 - 1) / (.8 + .9 - 1) = .15 / .7."""
    value, (low, high) = corrected_rate(100, 400, KnownError(80, 100, 90, 100))
    assert value == pytest.approx(0.15 / 0.7)
    assert low < 0.15 / 0.7 < high


def test_a_judge_without_error_in_a_large_sample_leaves_the_rate_as_it_was() -> None:
    value, interval = corrected_rate(30, 200, KnownError(10**7, 10**7, 10**7, 10**7))
    assert value == pytest.approx(0.15)
    assert interval == pytest.approx(wilson(30, 200), abs=1e-4)


def test_the_interval_knows_the_labelled_sample_too() -> None:
    few, many = (corrected_rate(60, 400, KnownError(0.8 * m, m, 0.95 * m, m))[1] for m in (40, 4000))
    assert few[0] < many[0] < many[1] < few[1]


def test_a_coin_corrects_nothing() -> None:
    assert corrected_rate(60, 400, KnownError(50, 100, 50, 100)) == (None, (0.0, 1.0))
    assert corrected_rate(60, 400, KnownError(0, 0, 50, 100)) == (None, (0.0, 1.0))
    assert corrected_rate(0, 0, KnownError(80, 100, 90, 100)) == (None, (0.0, 1.0))


@pytest.mark.parametrize("hits", [0, 1, 5, 399, 400])
def test_rates_and_intervals_stay_shares(hits: int) -> None:
    """Fewer hits than the judge's false alarms: cut to 0, which the interval holds."""
    value, (low, high) = corrected_rate(hits, 400, KnownError(80, 100, 90, 100))
    assert value is not None
    assert 0 <= low <= value <= high <= 1


def test_images_without_a_verdict_widen_both_ends() -> None:
    judge = KnownError(80, 100, 95, 100)
    without, with_errors = corrected_rate(40, 180, judge)[1], corrected_rate(40, 180, judge, errors=20)[1]
    assert with_errors[0] < without[0] < without[1] < with_errors[1]
