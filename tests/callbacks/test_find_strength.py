"""beta and lambda are found by the run, and are the same after a resume."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lit_safety.callbacks import FindStrength
from lit_safety.core.errors import UserError
from lit_safety.modules.checks import warn_if_not_moved
from lit_safety.objectives import ConstrainedDPO, DiffusionDPO, PairErrors, PairLabels, SafetyConstrainedDPO
from lit_safety.objectives.objective import Objective


def pairs(delta: list[float], gap: float = 2.0) -> tuple[PairErrors, PairLabels]:
    """Pairs whose policy errors moved by +delta / 2 and -delta / 2 against the reference's, and their costs."""
    moved, n = torch.tensor(delta), len(delta)
    zero = torch.zeros(n)
    labels = PairLabels(zero, torch.tensor([[0.0, 1.0]] * n), torch.tensor([[-1.0, gap - 1.0]] * n), torch.zeros(n, 2))
    return PairErrors(moved / 2, -moved / 2, zero, zero), labels


class Run:
    """Steps of a fit without a network: each brings the errors of given pairs."""

    def __init__(self, objective: Objective, callback: FindStrength, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("lit_safety.callbacks.find_strength.preference_module", lambda one: one)
        self.objective, self.callback, self.device = objective, callback, "cpu"
        self.last_means: dict[str, torch.Tensor] = {}
        strategy = SimpleNamespace(reduce=lambda value, reduce_op: value)
        self.trainer: Any = SimpleNamespace(global_step=0, strategy=strategy)

    def log_dict(self, logs: dict[str, float]) -> None:
        self.logs = logs

    def step(self, *batches: tuple[PairErrors, PairLabels]) -> None:
        """One optimizer step on micro-batches."""
        for number, batch in enumerate(batches):
            output = self.objective(*batch)
            self.last_means = {name: values.mean() for name, values in output.logs.items()}
            self.trainer.global_step += number == len(batches) - 1
            self.callback.on_train_batch_end(self.trainer, self, None, None, number)  # type: ignore[arg-type]


def started(
    objective: Objective, monkeypatch: pytest.MonkeyPatch, state: dict[str, Any] | None = None, **settings: Any
) -> Run:
    callback = FindStrength(**settings)
    run = Run(objective, callback, monkeypatch)
    if state is not None:
        callback.load_state_dict(state)
    callback.on_fit_start(run.trainer, run)  # type: ignore[arg-type]
    return run


def test_beta_moves_by_the_gradient_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    """beta = 100, Delta = -0.02 and -0.04: m = -50 Delta = 1 and 2.

    sigmoid(-1) = 0.2689, sigmoid(-2) = 0.1192, mean 0.1941. With target 0.3 and rate 2 beta becomes
    100 exp(2 (0.1941 - 0.3)) = 80.9. With lambda in units of |m|: mean |m| = 1.5, which at the new beta is
    1.5 x 0.809 = 1.213; C_l - C_w = 2; margin 0.5 gives lambda = 0.5 x 1.213 / 2 = 0.303.
    """
    objective = SafetyConstrainedDPO(beta=100.0, cost_weight=2.0)
    run = started(objective, monkeypatch, factor=0.3, margin=0.5, rate=2.0, every_n_steps=1)
    run.step(pairs([-0.02, -0.04]))
    factor = (1 / (1 + math.e) + 1 / (1 + math.e**2)) / 2
    beta = 100 * math.exp(2 * (factor - 0.3))
    assert objective.beta == pytest.approx(beta, rel=1e-5)
    assert objective.cost_weight == pytest.approx(0.5 * 1.5 * beta / 100 / 2, rel=1e-5)
    assert run.logs == {"strength/beta": objective.beta, "strength/cost_weight": objective.cost_weight}


def test_a_scale_of_the_errors_is_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors 50 times as small end in a beta 50 times as large, and in the same mean factor, wrong pairs or not."""
    found = []
    for scale in (1.0, 0.02):
        objective = DiffusionDPO(beta=100.0)
        run = started(objective, monkeypatch, factor=0.25, rate=1.0, every_n_steps=1)
        for _ in range(400):
            run.step(pairs([-0.02 * scale, -0.04 * scale, 0.01 * scale]))
        found.append(objective.beta)
        assert float(run.last_means["rewards/undecided"]) == pytest.approx(0.25, abs=0.005)
    assert found[1] == pytest.approx(50 * found[0], rel=0.02)


def test_beta_stays_within_its_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = DiffusionDPO(beta=10.0)
    run = started(objective, monkeypatch, most=2.0, rate=5.0, every_n_steps=1)
    for _ in range(20):
        run.step(pairs([0.001]))  # never learned
    assert objective.beta == 20.0
    for _ in range(40):
        run.step(pairs([-50.0]))
    assert objective.beta == 5.0


def test_accumulated_batches_move_it_as_one_batch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = (SafetyConstrainedDPO(beta=100.0, cost_weight=2.0) for _ in range(2))
    one = started(whole, monkeypatch, margin=0.5, every_n_steps=2)
    two = started(parts, monkeypatch, margin=0.5, every_n_steps=2)
    for _ in range(4):
        one.step(pairs([-0.02, -0.04, 0.01, -0.03]))
        two.step(pairs([-0.02, -0.04]), pairs([0.01, -0.03]))
    assert whole.beta != 100.0
    assert parts.beta == pytest.approx(whole.beta, rel=1e-6)
    assert parts.cost_weight == pytest.approx(whole.cost_weight, rel=1e-6)


@pytest.mark.parametrize("stop", [3, 4, 5])
def test_a_resumed_run_finds_the_same_numbers_to_the_bit(monkeypatch: pytest.MonkeyPatch, stop: int) -> None:
    steps = [pairs([-0.001 * i, -0.002 * i]) for i in range(1, 12)]
    objective = SafetyConstrainedDPO(beta=100.0, cost_weight=2.0)
    run = started(objective, monkeypatch, margin=0.5, every_n_steps=4)
    for batch in steps[:stop]:
        run.step(batch)
    state = run.callback.state_dict()
    again = SafetyConstrainedDPO(beta=100.0, cost_weight=2.0)
    resumed = started(again, monkeypatch, state, margin=0.5, every_n_steps=4)
    resumed.trainer.global_step = stop
    for batch in steps[stop:]:
        run.step(batch)
        resumed.step(batch)
    assert (again.beta, again.cost_weight) == (objective.beta, objective.cost_weight)
    assert objective.beta != 100.0


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"factor": 0.5}, "factor"), ({"factor": math.nan}, "factor"), ({"margin": -1.0}, "margin"),
     ({"rate": 0.0}, "rate"), ({"most": 0.5}, "most"), ({"every_n_steps": 0}, "every_n_steps")],
)  # fmt: skip
def test_a_setting_outside_its_range_is_named(settings: dict[str, float], named: str) -> None:
    with pytest.raises(UserError, match=named):
        FindStrength(**settings)  # type: ignore[arg-type]


def test_an_objective_without_lambda_has_no_margin_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"FindStrength.margin"):
        started(DiffusionDPO(beta=1.0), monkeypatch, margin=0.5)


def test_who_finds_the_strength_moves_no_dual_variable() -> None:
    """A fit without UpdateDual is warned of, whoever moves beta."""
    with pytest.warns(UserWarning, match="UpdateDual"):
        warn_if_not_moved(ConstrainedDPO(), [FindStrength()])


def test_sizes_are_logged_for_who_asks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = SafetyConstrainedDPO(beta=100.0, cost_weight=2.0)
    asked = {"rewards/sizes", "rewards/undecided", "costs/gaps"}
    assert not asked & set(objective(*pairs([-0.02])).logs)
    started(objective, monkeypatch)
    assert asked <= set(objective(*pairs([-0.02])).logs)
