import numpy as np
import pytest

from lit_safety.core.intervals import bootstrap, paired_difference, wilson


def test_wilson_of_half_of_twenty() -> None:
    """z^2 = 3.8415, p = .5: centre (.5 + .0960) / 1.1921 = .5, half width 1.96 sqrt(.0125 + .0024) / 1.1921 = .2007."""
    assert wilson(10, 20) == pytest.approx((0.2993, 0.7007), abs=1e-4)


def test_wilson_of_none_of_forty_is_not_a_point() -> None:
    """p = 0: upper bound = (z^2/n) / (1 + z^2/n) = .0960 / 1.0960 = .0876, where a bootstrap says 0."""
    assert wilson(0, 40) == pytest.approx((0.0, 0.0876), abs=1e-4)
    assert wilson(40, 40) == pytest.approx((0.9124, 1.0), abs=1e-4)


def test_errors_widen_to_cover_either_answer() -> None:
    """10 of 20 and 5 errors: from the lower bound of 10 of 25 to the upper bound of 15 of 25."""
    assert wilson(10, 20, errors=5) == (wilson(10, 25)[0], wilson(15, 25)[1])


def test_the_bootstrap_of_two_of_four() -> None:
    """Resamples of 4 answers of which half are yes hold 0..4 of them with probability 1, 4, 6, 4, 1 of 16: 1/16 = .0625
    is above 2.5% already, so the lower end is 0 of 4; 15/16 = .9375 is below 97.5%, so the upper end is 4 of 4."""
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
    """10 pairs, 6 turned false, 1 turned true: p = 2/12, q = 7/12, p - q = -.4167,
    half width 1.96 sqrt((.75 - .1736) / 12) = .4295."""
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
    """Same two shares (.5 and .5), once with no image changed, once with every image changed."""
    half = [True, False] * 20
    swapped = [False, True] * 20
    _, steady, _ = paired_difference(half, half)
    _, moved, _ = paired_difference(half, swapped)
    assert moved[1] - moved[0] > 3 * (steady[1] - steady[0])
