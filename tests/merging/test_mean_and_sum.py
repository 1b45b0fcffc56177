import pytest
import torch

from lit_safety.adapters.low_rank import LowRank
from lit_safety.core.errors import UserError
from lit_safety.merging.methods import mean, task_sum

# Two rank-1 updates of a 2 x 2 layer, the second with alpha = 2 r:
#   delta_1 = [1 0]^T [1 2]     = [1 2; 0 0]
#   delta_2 = 2 [1 1]^T [0 3]   = [0 6; 0 6]
ONE = LowRank(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [0.0]]))
TWO = LowRank(torch.tensor([[0.0, 3.0]]), torch.tensor([[1.0], [1.0]]), scale=2.0)


def test_mean_by_hand():
    """(delta_1 + delta_2) / 2 = [0.5 4; 0 3]"""
    merged = mean([ONE, TWO], [1.0, 1.0])
    assert merged.delta().tolist() == [[0.5, 4.0], [0.0, 3.0]]
    assert merged.rank == 2


def test_weighted_mean_by_hand():
    """(3 delta_1 + delta_2) / 4 = [0.75 3; 0 1.5]"""
    assert mean([ONE, TWO], [3.0, 1.0]).delta().tolist() == [[0.75, 3.0], [0.0, 1.5]]


def test_sum_by_hand():
    """2 delta_1 - delta_2 = [2 4; 0 0] - [0 6; 0 6] = [2 -2; 0 -6]"""
    assert task_sum([ONE, TWO], [2.0, -1.0]).delta().tolist() == [[2.0, -2.0], [0.0, -6.0]]


def test_averaging_the_factors_apart_is_another_update():
    """mean(B) mean(A), scales folded into B: [1.5 1]^T [0.5 2.5] = [0.75 3.75; 0.5 2.5], and the mean is [0.5 4; 0
    3]."""
    a = (ONE.a + TWO.a) / 2
    b = (ONE.scale * ONE.b + TWO.scale * TWO.b) / 2
    assert (b @ a).tolist() == [[0.75, 3.75], [0.5, 2.5]]
    exact = mean([ONE, TWO], [1.0, 1.0]).delta().float()
    # sqrt(0.25^2 + 0.25^2 + 0.5^2 + 0.5^2) / sqrt(0.25 + 16 + 9) = 0.7906 / 5.0249
    assert float((b @ a - exact).norm() / exact.norm()) == pytest.approx(0.1573, abs=1e-4)


@pytest.mark.parametrize("experts", [2, 7])
def test_summing_the_factors_apart_is_off_by_more_than_the_mean_itself(experts: int):
    """What PEFT's `linear` does at weights 1/K: (sum_k B_k / sqrt K)(sum_k A_k / sqrt K) has K (K - 1) cross terms
    next to the K that are wanted; for unrelated experts all are of one size, so the relative error is sqrt(K - 1)."""
    draw = torch.Generator().manual_seed(0)
    parts = [LowRank(torch.randn(4, 256, generator=draw), torch.randn(256, 4, generator=draw)) for _ in range(experts)]
    exact = mean(parts, [1.0] * experts).delta()
    apart = torch.stack([p.b for p in parts]).sum(0) @ torch.stack([p.a for p in parts]).sum(0) / experts
    assert float((apart - exact).norm() / exact.norm()) == pytest.approx((experts - 1) ** 0.5, rel=0.1)


def test_weights_without_a_sum_are_refused():
    with pytest.raises(UserError, match="add up to 0"):
        mean([ONE, TWO], [1.0, -1.0])
