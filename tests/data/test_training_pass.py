"""What is said of a pass over the training pairs before it begins."""

from __future__ import annotations

import logging
import re

import pytest

from lit_safety.core.errors import UserError
from lit_safety.data.datamodule import check_pass, say_pass
from lit_safety.data.reading.order import Deal, Group
from lit_safety.data.reading.select import Selection


def group(pairs: int, size: tuple[int, int] | None = None) -> Group:
    return Group(Selection((pairs,), None), size=size)


def said(caplog: pytest.LogCaptureFixture, groups: list[Group], weights: list[float] | None = None) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.INFO):
        say_pass(groups, Deal(2, world=2, accumulate=2), sum(one.selection.total for one in groups), weights)
    return caplog.messages


def test_one_step_is_enough_and_a_pair_less_is_not():
    """A step takes 2 (batch) x 2 (ranks) x 2 (accumulated) = 8 pairs: of one group, or with weights of all together."""
    deal = Deal(2, world=2, accumulate=2)
    check_pass([group(8)], deal, 8, None)
    check_pass([group(7), group(1)], deal, 8, [1.0, 1.0])
    with pytest.raises(UserError, match=r"has 7 pairs.* 2 .* x 2 \(ranks\) x 2"):
        check_pass([group(7)], deal, 7, None)
    with pytest.raises(UserError, match="has 8 pairs"):
        check_pass([group(7), group(1)], deal, 8, None)
    with pytest.raises(UserError, match="has 9 pairs, but each category"):
        check_pass([], deal, 9, None)


def test_what_fills_no_step_is_counted_by_group(caplog: pytest.LogCaptureFixture):
    """Steps of 8: of 19 pairs 3 are over, of 9 pairs 1; 16 and 8 fill two steps and one."""
    assert said(caplog, [group(19), group(9)]) == [
        "each pass leaves out 4 of 28 training pairs, and different ones each time"
    ]
    assert said(caplog, [group(16), group(8)]) == []


def test_shapes_are_listed(caplog: pytest.LogCaptureFixture):
    assert said(caplog, [group(8, (24, 40)), group(16, (32, 32))]) == ["pairs by shape: 40 x 24 (8), 32 x 32 (16)"]


def test_shares_of_a_mix_are_listed(caplog: pytest.LogCaptureFixture):
    """40 pairs are 5 steps of 8; by 3 : 1 they are 30 and 10, so the second group comes round twice."""
    first, second = said(caplog, [group(35), group(5)], [3.0, 1.0])
    assert re.findall(r"\d+|\bdata\S+", first) == ["30", "35", "data.init_args.train[0]"]
    assert re.findall(r"\d+|\bdata\S+", second) == ["10", "5", "data.init_args.train[1]"]
