"""Without ZeRO; with it these are tested by fits under DeepSpeed."""

import pytest
import torch
from torch import nn

from lit_safety.adapters.gathered import gathered, master_weights, replaced


def test_weights_that_no_zero_holds_are_copied():
    parameters = {"x": nn.Parameter(torch.ones(2))}
    copies = master_weights(parameters)
    copies["x"].zero_()
    with gathered(parameters.values(), write=True):
        assert parameters["x"].tolist() == [1, 1]


def test_masters_are_gathered_on_deepspeeds_device(monkeypatch: pytest.MonkeyPatch):
    """When a fit ends the module lies on the CPU, where NCCL gathers nothing. A number format stands for a GPU here:
    `.to` takes one as it takes a device."""

    class Accelerator:
        def current_device_name(self) -> torch.dtype:
            return torch.float64

    found = []

    def gather(parameter: nn.Parameter) -> torch.Tensor:
        found.append(parameter.dtype)
        return torch.full_like(parameter, 2.0)

    monkeypatch.setattr("deepspeed.accelerator.get_accelerator", Accelerator)
    monkeypatch.setattr("deepspeed.utils.safe_get_full_fp32_param", gather)
    parameter = nn.Parameter(torch.ones(2))
    parameter._hp_mapping = None  # by this ZeRO 1 and 2 mark theirs
    assert master_weights({"x": parameter})["x"].tolist() == [2, 2]
    assert found == [torch.float64]
    assert parameter.dtype == torch.float32
    assert parameter.tolist() == [1, 1]


def test_replaced_weights_keep_their_precision_and_go_away_again():
    """What bf16 would round: 1 + 2^-10."""
    network = nn.Module()
    network.x = parameter = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    with replaced(network, {"x": parameter}, {"x": torch.tensor([1 + 2**-10])}):
        assert float(parameter.detach()) == 1 + 2**-10
    assert parameter.dtype == torch.bfloat16
    assert float(parameter.detach()) == 0
