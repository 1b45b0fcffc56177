from pathlib import Path

import pytest
import torch
from torch import nn

from lit_safety.core.errors import UserError
from lit_safety.worlds.training import check_device, fast_numbers, launch, share_gradients


def test_one_process_keeps_its_gradients_and_numbers() -> None:
    used, unused = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.zeros(1))
    (used.square().sum()).backward()
    assert share_gradients([used, unused], 0.25, torch.tensor(3.0), world=1) == (0.25, torch.tensor(3.0))
    assert used.grad is not None
    assert used.grad.tolist() == [2.0, 4.0]
    assert unused.grad is None


def _share(rank: int, world: int, folder: Path) -> None:
    used, unused = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.zeros(1))
    used.grad = torch.tensor([1.0 + 2 * rank, 4.0])
    fraction, loss = share_gradients([used, unused], 0.25 + 0.5 * rank, torch.tensor(3.0 + 4 * rank), world)
    torch.save({"gradient": used.grad, "fraction": fraction, "loss": loss}, folder / f"{rank}.pt")


def test_two_processes_train_with_the_mean_of_their_gradients(tmp_path: Path) -> None:
    """Gradients (1, 4) and (3, 4): (2, 4). Fractions 0.25 and 0.75: 0.5. Losses 3 and 7: 5."""
    launch(_share, 2, tmp_path)
    for rank in range(2):
        shared = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert shared["gradient"].tolist() == [2.0, 4.0]
        assert (shared["fraction"], float(shared["loss"])) == (0.5, 5.0)


def test_a_device_that_is_not_there_is_one_line() -> None:
    check_device("cpu")
    with pytest.raises(UserError, match="--device cuda:7"):
        check_device("cuda:7")


@pytest.mark.parametrize("has_instructions", [True, False])
def test_bfloat16_where_the_cpu_has_it(has_instructions: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_instructions)
    weight = torch.eye(2)
    with fast_numbers(torch.device("cpu")):
        assert (weight @ weight).dtype is (torch.bfloat16 if has_instructions else torch.float32)


def test_one_process_trains_in_this_one() -> None:
    calls = []
    launch(lambda *arguments: calls.append(arguments), 1, "work", 5)
    assert calls == [(0, 1, "work", 5)]
