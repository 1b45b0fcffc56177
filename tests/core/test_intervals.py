import numpy as np
import pytest

from lit_safety.core.intervals import KnownError, bootstrap, corrected_rate, paired_difference, wilson

DRAWS = 2000


def test_wilson_of_half_of_twenty() -> None:
    """z^2 = 3.8415, p = 0.5: centre (0.5 + 0.0960) / 1.1921 = 0.5, half width 1.96 sqrt(0.0125 + 0.0024) / 1.1921 =
    0.2007."""
    assert wilson(10, 20) == pytest.approx((0.2993, 0.7007), abs=1e-4)


def test_wilson_of_none_of_forty_is_not_a_point() -> None:
    """p = 0: upper bound = (z^2/n) / (1 + z^2/n) = 0.0960 / 1.0960 = 0.0876, where a bootstrap says 0."""
    assert wilson(0, 40) == pytest.approx((0.0, 0.0876), abs=1e-4)
    assert wilson(40, 40) == pytest.approx((0.9124, 1.0), abs=1e-4)


def test_errors_widen_to_cover_either_answer() -> None:
    """10 of 20 and 5 errors: from the lower bound of 10 of 25 to the upper bound of 15 of 25."""
    assert wilson(10, 20, errors=5) == (wilson(10, 25)[0], wilson(15, 25)[1])


def test_the_bootstrap_of_two_of_four() -> None:
    """Resamples of 4 answers of which half are yes hold 0..4 of them with probability 1, 4, 6, 4, 1 of 16: 1/16 =
    0.0625 is above 2.5% already, so the lower end is 0 of 4; 15/16 = 0.9375 is below 97.5%, so the upper end is 4 of
    4."""
    assert bootstrap(2, 4) == (0.0, 1.0)
    assert bootstrap(0, 40) == (0.0, 0.0)
    assert bootstrap(40, 40) == (1.0, 1.0)
    assert bootstrap(0, 0) == (0.0, 1.0)
    assert bootstrap(10, 20, errors=5) == (bootstrap(10, 25)[0], bootstrap(15, 25)[1])


def test_the_bootstrap_is_what_resampling_tends_to() -> None:
    """300 yes of 1,000: 20,000 resamples' own 2.5% and 97.5% points, to one answer in a thousand."""
    drawn = np.random.default_rng(0).binomial(1000, 0.3, 20_000) / 1000
    assert bootstrap(300, 1000) == pytest.approx(tuple(np.quantile(drawn, (0.025, 0.975))), abs=1.01e-3)


def test_nothing_asked_is_everything_possible() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


def test_paired_difference_arithmetic() -> None:
    """10 pairs, 6 turned false, 1 turned true: p = 2/12, q = 7/12, p - q = -0.4167,
    half width 1.96 sqrt((0.75 - 0.1736) / 12) = 0.4295."""
    before = [True] * 6 + [False] + [True, True, False]
    after = [False] * 6 + [True] + [True, True, False]
    value, interval, n = paired_difference(before, after)
    assert (value, n) == (-0.5, 10)
    assert interval == pytest.approx((-0.8462, 0.0129), abs=1e-4)


def test_paired_difference_of_equal_arms_is_not_a_point() -> None:
    value, (low, high), _ = paired_difference([True] * 50, [True] * 50)
    assert value == 0
    assert low == -high
    assert 0.02 < high < 0.1


def test_pairs_with_an_error_are_counted_out_and_widen() -> None:
    answered = paired_difference([True, False, True], [True, False, False])
    with_error = paired_difference([True, False, True, None, True], [True, False, False, True, None])
    assert with_error[0] == answered[0]
    assert with_error[2] == 3
    assert with_error[1][0] < answered[1][0]
    assert with_error[1][1] > answered[1][1]


def test_pairing_uses_the_images_not_only_the_shares() -> None:
    """Same two shares (0.5 and 0.5), once with no image changed, once with every image changed."""
    half = [True, False] * 20
    swapped = [False, True] * 20
    _, steady, _ = paired_difference(half, half)
    _, moved, _ = paired_difference(half, swapped)
    assert moved[1] - moved[0] > 3 * (steady[1] - steady[0])


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
    """t = 0.25, Se = 0.8, Sp = 0.9: P = (0.25 + 0.9 - 1) / (0.8 + 0.9 - 1) = 0.15 / 0.7."""
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
