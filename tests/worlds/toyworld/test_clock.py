import pytest

from lit_safety.worlds.training import Budget, decayed


def test_a_budget_counts_what_interrupted_runs_spent_and_ends() -> None:
    assert Budget(minutes=1, spent=30).fraction == pytest.approx(0.5, abs=0.01)
    assert Budget(minutes=1, spent=90).fraction == 1
    assert Budget(minutes=0).fraction == 1


def test_learning_rate_warms_up_holds_and_ends_at_zero() -> None:
    factors = [decayed(i / 100) for i in range(101)]
    assert factors[0] < 0.05
    assert factors[2:30] == [1.0] * 28
    assert factors[30:] == sorted(factors[30:], reverse=True)
    assert factors[100] == pytest.approx(0)
