import torch
from torch import nn

from lit_safety.worlds.training import launch, share_gradients


def test_one_process_keeps_its_gradients_and_numbers() -> None:
    used, unused = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.zeros(1))
    (used.square().sum()).backward()
    assert share_gradients([used, unused], [0.25, 3.0], world=1) == [0.25, 3.0]
    assert used.grad is not None
    assert used.grad.tolist() == [2.0, 4.0]
    assert unused.grad is None


def test_one_process_trains_in_this_one() -> None:
    calls = []
    launch(lambda *arguments: calls.append(arguments), 1, "work", 5)
    assert calls == [(0, 1, "work", 5)]
