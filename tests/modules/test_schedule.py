"""The learning rate's schedule against its formula, for runs of any length."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, SequentialLR

from lit_safety.core.errors import UserError
from lit_safety.modules.schedule import ScheduleSettings, make_optimizer, make_scheduler
from tests.helpers.one_cycle import one_cycle

PEAK = 3e-3


def factory(kind: Any = OneCycleLR, **settings: Any) -> Any:
    """As the command line makes it out of a YAML."""
    return functools.partial(lambda kind, optimizer, **given: kind(optimizer, **given), kind, **settings)


def made(steps: float, kind: Any = OneCycleLR, lr: float = PEAK, **settings: Any) -> tuple[Any, Any]:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    return optimizer, make_scheduler(factory(kind, **settings), optimizer, steps)


def rates(optimizer: Any, scheduler: Any, steps: int) -> list[float]:
    """The rates of so many steps; the scheduler is stepped after the last one too."""
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("steps", [2, 5, 9, 10, 11, 20, 150])
def test_an_open_length_is_the_run_s(steps: int):
    """Of ten steps one warms up, which torch divides by zero for."""
    found = rates(*made(steps, max_lr=PEAK, total_steps=None, pct_start=0.1), steps)
    assert found == pytest.approx(one_cycle(steps), rel=1e-6)


@pytest.mark.parametrize(("steps", "share"), [(1, 0.1), (10, 1.0), (2, 0.5), (1, 1.0), (10, 0.0)])
def test_every_share_of_warm_up_gives_rates(steps: int, share: float):
    for three_phase in (False, True):
        settings = {"max_lr": PEAK, "pct_start": share, "three_phase": three_phase}
        found = rates(*made(steps, total_steps=None, **settings), steps)
        assert all(PEAK / 1e6 < rate <= PEAK * (1 + 1e-6) for rate in found[:1])
        assert all(math.isfinite(rate) for rate in found)


def test_a_stated_length_is_left_alone_and_refused_where_the_run_is_longer():
    found = rates(*made(5, max_lr=PEAK, total_steps=20, pct_start=0.3), 5)
    assert found == pytest.approx(one_cycle(20, 0.3)[:5], rel=1e-6)
    with pytest.raises(UserError, match="total_steps"):
        made(21, max_lr=PEAK, total_steps=20, pct_start=0.3)

    def chained(optimizer: Any) -> Any:
        parts = [OneCycleLR(optimizer, PEAK, total_steps=20), CosineAnnealingLR(optimizer, 10)]
        return SequentialLR(optimizer, parts, [20])

    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    with pytest.raises(UserError, match="total_steps"):
        make_scheduler(chained, optimizer, 30)


def test_an_open_length_of_a_run_without_end_is_refused():
    with pytest.raises(UserError, match="max_steps"):
        made(math.inf, max_lr=PEAK, total_steps=None, pct_start=0.1)


def test_a_length_that_a_run_without_end_outlives_is_refused():
    with pytest.raises(UserError, match="max_steps"):
        made(math.inf, max_lr=PEAK, total_steps=20, pct_start=0.1)
    made(math.nan, max_lr=PEAK, total_steps=20, pct_start=0.1)  # without a trainer


@pytest.mark.parametrize(
    ("settings", "key"),
    [({"pct_start": math.nan}, "pct_start"), ({"pct_start": 1.5}, "pct_start"), ({"max_lr": -PEAK}, "lr"),
     ({"max_lr": math.nan}, "lr"), ({"max_lr": math.inf}, "lr"), ({"total_steps": 0}, "total_steps"),
     ({"div_factor": 0.0}, "lr_scheduler"), ({"anneal_strategy": "up"}, "anneal_strategy")],
)  # fmt: skip
def test_a_schedule_that_cannot_be_meant_names_its_key(settings: dict[str, Any], key: str):
    with pytest.raises(UserError, match=key):
        made(10, **{"max_lr": PEAK, "total_steps": 10, "pct_start": 0.1, **settings})


@pytest.mark.parametrize(
    ("settings", "key"),
    [({"lr": -PEAK}, "optimizer"), ({"lr": math.nan}, "optimizer"), ({"lr": math.inf}, "lr"),
     ({"lr": PEAK, "weight_decay": math.inf}, "weight_decay"), ({"lr": PEAK, "weight_decay": math.nan}, "decay"),
     ({"lr": PEAK, "eps": math.inf}, "eps"), ({"lr": PEAK, "betas": (1.5, 0.9)}, "beta")],
)  # fmt: skip
def test_an_optimizer_that_cannot_be_meant_names_its_key(settings: dict[str, Any], key: str):
    with pytest.raises(UserError, match=key):
        make_optimizer(functools.partial(torch.optim.AdamW, **settings), [torch.nn.Parameter(torch.zeros(1))])


def resumed(before: tuple[Any, Any], after: tuple[Any, Any]) -> None:
    """Put the state of one into the other, as a trainer does."""
    settings = ScheduleSettings(*after)
    after[0].load_state_dict(before[0].state_dict())
    after[1].load_state_dict(before[1].state_dict())
    settings.restore(*after)


def test_a_finished_schedule_goes_on_as_a_longer_one():
    short = made(20, max_lr=PEAK, total_steps=None, pct_start=0.1)
    rates(*short, 20)
    longer = made(60, max_lr=PEAK, total_steps=None, pct_start=0.1)
    resumed(short, longer)
    assert rates(*longer, 40) == pytest.approx(one_cycle(60)[20:], rel=1e-6)
    expected = made(60, max_lr=PEAK, total_steps=None, pct_start=0.1)
    rates(*expected, 60)
    assert longer[0].param_groups[0]["betas"] == pytest.approx(expected[0].param_groups[0]["betas"])


def test_an_unchanged_schedule_goes_on_to_the_bit():
    whole, first, second = (made(20, max_lr=PEAK, total_steps=None, pct_start=0.1) for _ in range(3))
    expected = rates(*whole, 20)
    begun = rates(*first, 7)
    resumed(first, second)
    assert begun + rates(*second, 13) == expected


def test_another_peak_and_weight_decay_are_the_new_config_s():
    first = made(20, max_lr=PEAK, total_steps=None, pct_start=0.1)
    rates(*first, 7)
    second = made(20, max_lr=2 * PEAK, total_steps=None, pct_start=0.1)
    second[0].param_groups[0]["weight_decay"] = 0.5
    resumed(first, second)
    assert second[0].param_groups[0]["weight_decay"] == 0.5
    assert rates(*second, 13) == pytest.approx(one_cycle(20, peak=2 * PEAK)[7:], rel=1e-6)


def test_a_finished_cosine_goes_on_as_a_longer_one():
    first = made(10, CosineAnnealingLR, T_max=10)
    rates(*first, 10)
    second = made(20, CosineAnnealingLR, T_max=20)
    resumed(first, second)
    expected = [PEAK * (1 + math.cos(math.pi * step / 20)) / 2 for step in range(10, 20)]
    assert rates(*second, 10) == pytest.approx(expected, rel=1e-6)


def test_a_constant_rate_is_the_new_config_s():
    optimizers = [torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=lr) for lr in (1e-3, 1e-4)]
    settings = ScheduleSettings(optimizers[1], None)
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    settings.restore(optimizers[1], None)
    assert optimizers[1].param_groups[0]["lr"] == 1e-4


def test_a_schedule_that_the_run_before_had_not_begins_at_its_step():
    optimizer, scheduler = made(20, max_lr=PEAK, total_steps=None, pct_start=0.1)
    ScheduleSettings(optimizer, scheduler).restore(optimizer, scheduler, step=7)
    assert rates(optimizer, scheduler, 13) == pytest.approx(one_cycle(20)[7:], rel=1e-6)
