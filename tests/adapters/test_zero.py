"""Without ZeRO; with it these are tested by fits under DeepSpeed."""

import torch
from torch import nn

from lit_safety.adapters.zero import gathered, master_weights, replaced


def test_weights_that_no_zero_holds_are_copied():
    parameters = {"x": nn.Parameter(torch.ones(2))}
    copies = master_weights(parameters)
    copies["x"].zero_()
    with gathered(parameters.values(), write=True):
        assert parameters["x"].tolist() == [1, 1]


def test_replaced_weights_keep_their_precision_and_go_away_again():
    """What bf16 would round: 1 + 2^-10."""
    network = nn.Module()
    network.x = parameter = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    with replaced(network, {"x": parameter}, {"x": torch.tensor([1 + 2**-10])}):
        assert float(parameter.detach()) == 1 + 2**-10
    assert parameter.dtype == torch.bfloat16
    assert float(parameter.detach()) == 0
