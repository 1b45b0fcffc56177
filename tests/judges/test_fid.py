import statistics

import pytest
import torch

from lit_safety.judges.fid import GROUPS, fid, jackknife, left_out


def draw(n: int, d: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) + shift


def test_the_distance_of_two_small_sets() -> None:
    """x: 0 and 2 on the first axis: mean (1, 0), variance (2, 0). y: (3, 0) and (3, 8): mean (3, 4), variance (0, 32).
    The covariances do not overlap, so FID = 2^2 + 4^2 + 2 + 32 = 54."""
    x = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    y = torch.tensor([[3.0, 0.0], [3.0, 8.0]])
    assert fid(x, y) == pytest.approx(54)


def test_the_same_set_is_at_distance_zero() -> None:
    x = draw(30, 5, 0)
    assert fid(x, x) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("n", "m", "d"), [(60, 50, 7), (45, 50, 80)])
def test_each_group_is_left_out_once(n: int, m: int, d: int) -> None:
    """Against torchmetrics on what is left, with more images than features and with fewer."""
    x, y = draw(n, d, 1), draw(m, d, 2, 0.3)
    parts = left_out(x, y, paired=False)
    assert parts is not None
    rows = torch.arange(n) % GROUPS
    expected = [fid(x[rows != g], y) for g in range(GROUPS)]
    assert parts.tolist() == pytest.approx(expected, rel=1e-5)


def test_a_pair_is_left_out_together() -> None:
    x, y = draw(60, 4, 3), draw(60, 4, 4)
    parts = left_out(x, y, paired=True)
    rows = torch.arange(60) % GROUPS
    assert parts is not None
    assert parts[7].item() == pytest.approx(fid(x[rows != 7], y[rows != 7]))


def test_the_interval_is_the_jackknife_s() -> None:
    """Parts 0 (ten times) and 2 (ten times): sum of squares 20, half = 2.093024 sqrt(19/20 * 20) = 9.12325."""
    parts = torch.tensor([0.0, 2.0] * 10)
    assert jackknife(5.0, parts) == pytest.approx([5 - 9.12325, 5 + 9.12325], abs=1e-4)
    assert jackknife(5.0, None) is None


def test_its_width_is_that_of_repeated_draws() -> None:
    """40 sets from one distribution: the spread of their FIDs and the mean of the jackknife's errors agree."""
    reference = draw(400, 6, 0, 0.5)
    values, errors = [], []
    for seed in range(1, 41):
        x = draw(120, 6, seed)
        values.append(fid(x, reference))
        low, high = jackknife(0.0, left_out(x, reference, paired=False)) or (0, 0)
        errors.append((high - low) / 2 / 2.093024)
    assert 0.7 < statistics.mean(errors) / statistics.stdev(values) < 1.4


def test_too_few_images_give_no_interval() -> None:
    assert left_out(draw(39, 3, 0), draw(39, 3, 1), paired=True) is None
