from dataclasses import dataclass, field

import pytest

from lit_safety.errors import UserError
from lit_safety.modules.label_checks import check_labels
from lit_safety.objectives import (
    BFPO,
    IPO,
    ConstrainedDPO,
    DiffusionDPO,
    DiffusionSDPO,
    FocalInverse,
    Hinge,
    RePO,
    SafetyConstrainedDPO,
)


@dataclass
class HostLists:
    """What the check may read of a batch. It has no tensors: reading one would wait for the device."""

    keys: list[str] = field(default_factory=lambda: ["a", "b"])
    orders: list[str] = field(default_factory=lambda: ["safety", "quality"])
    has_cost: list[bool] = field(default_factory=lambda: [True, True])
    has_score: list[bool] = field(default_factory=lambda: [True, True])
    has_harmful: list[bool] = field(default_factory=lambda: [True, True])


MISSING = [True, False]


@pytest.mark.parametrize(
    ("objective", "batch", "message"),
    [
        (SafetyConstrainedDPO(), HostLists(has_cost=MISSING), "sample b has no cost.*cost_weight: 0"),
        (RePO(), HostLists(has_cost=MISSING), "sample b has no cost.*penalty_weight: 0"),
        (ConstrainedDPO(dual=0.0), HostLists(has_cost=MISSING), "sample b has no cost.*choose another objective"),
        (ConstrainedDPO(), HostLists(has_score=MISSING), "sample b has no score"),
        (BFPO(), HostLists(has_harmful=MISSING), "sample b has no harmful label.*skip_unknown: true"),
        (SafetyConstrainedDPO(), HostLists(orders=["safety", "composite"]), "sample b is ordered by quality minus"),
    ],
    ids=["scdpo-cost", "repo-cost", "constrained-cost", "constrained-score", "bfpo-label", "scdpo-composite"],
)
def test_what_is_missing_is_named_with_the_way_out(objective, batch, message: str):
    with pytest.raises(UserError, match=message):
        check_labels(objective, batch)
    check_labels(objective, HostLists())


@pytest.mark.parametrize(
    "objective",
    [
        DiffusionDPO(),
        IPO(),
        Hinge(),
        DiffusionSDPO(),
        FocalInverse(),
        SafetyConstrainedDPO(cost_weight=0.0),
        RePO(penalty_weight=0.0),
        BFPO(skip_unknown=True),
    ],
    ids=lambda objective: type(objective).__name__,
)
def test_an_objective_that_reads_no_labels_takes_any_pair(objective):
    check_labels(objective, HostLists(["a"], ["composite"], [False], [False], [False]))
