import math

import pytest
import torch

from lit_safety.errors import UserError
from lit_safety.modules.monitoring import FiniteLossGuard, TimestepBins


def test_bins_golden():
    """Four bins; fractions .1 and .2 fall into bin 0 (mean of 1 and 3 = 2), .9 into bin 3, bins 1 and 2 are empty."""
    bins = TimestepBins(4)
    bins.update(torch.tensor([0.1, 0.9]), torch.tensor([1.0, 5.0]), torch.tensor([10.0, 50.0]))
    bins.update(torch.tensor([0.2]), torch.tensor([3.0]), torch.tensor([30.0]))
    means = bins.compute()
    assert means["error/chosen/t00-25"].item() == 2.0
    assert means["error/rejected/t00-25"].item() == 20.0
    assert means["error/chosen/t75-100"].item() == 5.0
    assert math.isnan(means["error/chosen/t25-50"].item())


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_samples():
    guard = FiniteLossGuard()
    guard.watch(torch.tensor(1.0), ["0001"])
    guard.check()
    guard.watch(torch.tensor(float("nan")), ["0002", "0003"])
    with pytest.raises(UserError, match="0002, 0003"):
        guard.check()
