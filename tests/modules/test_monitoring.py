import math

import pytest
import torch

from lit_safety.core.errors import UserError
from lit_safety.modules.monitoring import FiniteLossGuard, TimestepBins


def test_bins_golden():
    """Four bins; fractions 0.1 and 0.2 fall into bin 0 (mean of 1 and 3 = 2), 0.9 into bin 3, bins 1 and 2 are
    empty."""
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
    with pytest.raises(UserError, match="samples 0002, 0003:"):
        guard.check()


def test_a_step_reads_the_flag_of_the_step_before_last():
    """Of the last one nothing is asked while its step may still be in a device's queue."""
    guard = FiniteLossGuard()
    for loss, key in ((1.0, "0001"), (math.inf, "0002"), (1.0, "0003")):
        guard.advance()
        guard.watch(torch.tensor(loss), [key])
        guard.watch_gradient(torch.tensor(1.0))
    with pytest.raises(UserError, match="samples 0002:"):
        guard.advance()


def test_a_gradient_that_is_not_finite_counts_for_the_micro_batches_of_its_step():
    guard = FiniteLossGuard()
    guard.watch(torch.tensor(1.0), ["0001"])
    guard.watch(torch.tensor(1.0), ["0002"])
    guard.watch_gradient(torch.tensor(math.nan))
    guard.advance()
    with pytest.raises(UserError, match="samples 0001, 0002:"):
        guard.advance()
