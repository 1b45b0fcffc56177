import pytest

from lit_safety.core.intervals import bonett_price, paired_difference, wilson
from lit_safety.evaluation.users.metrics import paired_share, share


def test_a_user_s_images_count_as_a_group():
    """Four users of 5 images: 5, 5, 0, 0 hits; p = 10 / 20 = 0.5.

    v = 4 / 3 * (2 * (5 - 2.5)^2 + 2 * (0 - 2.5)^2) / 20^2 = 4 / 3 * 25 / 400 = 0.08333
    s = 0.5 * 0.5 / 19 = 0.01316, deff = 19 / 3, so 20 images are worth 60 / 19: Wilson of 30 / 19 of 60 / 19.
    """
    found = share([True] * 10 + [False] * 10, [user for user in "abcd" for _ in range(5)])
    assert (found.value, found.hits, found.n, found.users) == (0.5, 10, 20, 4)
    assert found.deff == pytest.approx(19 / 3)
    assert found.interval == pytest.approx(wilson(30 / 19, 60 / 19))
    assert found.interval[1] - found.interval[0] > wilson(10, 20)[1] - wilson(10, 20)[0]


def test_users_who_agree_are_counted_image_by_image():
    """Every user 3 hits of 5: no variance between users, deff is 1 and not below."""
    answers = [True, True, True, False, False] * 4
    found = share(answers, [user for user in "abcd" for _ in range(5)])
    assert found.deff == 1.0
    assert found.interval == wilson(12, 20)
    assert share([False] * 20, ["a"] * 10 + ["b"] * 10).interval == wilson(0, 20)
    assert share([True, False], ["a", "a"]).deff == 1.0


def test_errors_widen_the_interval_both_ways():
    found = share([True, False, None], ["a", "b", "c"])
    assert (found.value, found.n, found.errors) == (0.5, 2, 1)
    assert found.interval == (wilson(1, 3)[0], wilson(2, 3)[1])
    nothing = share([None, None], ["a", "b"])
    assert (nothing.value, nothing.interval, nothing.errors) == (None, (0.0, 1.0), 2)
    assert share([], []).interval == (0.0, 1.0)


def test_paired_differences_by_user():
    """Users a and b: all 4 images of a turn true, none of b's. Mean change 0.5.

    v = 2 / 1 * ((4 - 2)^2 + (0 - 2)^2) / 8^2 = 0.25; s = (4 / 8 - 0.25) / 7 = 0.0357; deff = 7.
    So they are worth 8 / 7 pairs, of which 4 / 7 gained.
    """
    found = paired_share([False] * 8, [True] * 4 + [False] * 4, ["a"] * 4 + ["b"] * 4)
    assert found.value == 0.5
    assert found.deff == pytest.approx(7.0)
    assert found.interval == pytest.approx(bonett_price(4 / 7, 0, 8 / 7))


def test_without_groups_it_is_the_paired_difference():
    before, after = [True, True, False, False, None, True], [True, False, True, False, True, False]
    found = paired_share(before, after, list("abcdef"))
    value, interval, n = paired_difference(before, after)
    assert (found.value, found.n, found.errors, found.deff) == (value, n, 1, pytest.approx(1.0))
    assert found.interval == pytest.approx(interval)
