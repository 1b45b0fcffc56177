import pytest
import torch
from lightning.fabric.utilities import move_data_to_device

from lit_safety.data.format.sample import parse_metadata
from lit_safety.data.reading.batch import Pair, collate


def pair(key: str, **metadata) -> Pair:
    harmful = {"harmful": {"chosen": False, "rejected": True}}
    parsed = parse_metadata({"prompt": "a cat", "prompt_kind": "clean", "order": "quality", **harmful, **metadata}, key)
    return Pair(key, 0, parsed, torch.zeros(3, 2, 2), torch.ones(3, 2, 2), key)


def test_labels_go_side_by_side_and_unknown_ones_are_nan():
    batch = collate(
        [
            pair("a", score={"chosen": 0.75, "rejected": 0.5}, cost={"chosen": -1.0, "rejected": 2.0}),
            pair("b", harmful={"chosen": False, "rejected": None}),
        ]
    )
    assert batch.score[0].tolist() == [0.75, 0.5]
    assert batch.cost[0].tolist() == [-1.0, 2.0]
    assert torch.isnan(batch.score[1]).all()
    assert torch.isnan(batch.cost[1]).all()
    assert batch.harmful[0].tolist() == [0.0, 1.0]
    assert torch.isnan(batch.harmful[1]).tolist() == [False, True]
    assert (batch.has_score, batch.has_cost, batch.has_harmful) == ([True, False], [True, False], [True, False])


def test_moving_a_batch_moves_its_tensors():
    moved = collate([pair("a", score={"chosen": 1.0, "rejected": 0.0})]).to("meta")
    assert moved.score.device.type == moved.cost.device.type == moved.harmful.device.type == "meta"
    assert moved.has_score == [True]


@pytest.mark.parametrize(("device", "waits"), [("meta", False), ("cpu", True)])
def test_a_trainer_does_not_wait_for_a_batch_on_a_device(device: str, waits: bool, monkeypatch: pytest.MonkeyPatch):
    """Lightning leaves it to the batch; a copy that waits would wait for the step before, too."""
    asked: list[bool] = []
    move = torch.Tensor.to

    def to(tensor: torch.Tensor, *args, **options) -> torch.Tensor:
        asked.append(options.get("non_blocking", False))
        return move(tensor, *args, **options)

    monkeypatch.setattr(torch.Tensor, "to", to)
    move_data_to_device(collate([pair("a"), pair("b")]), torch.device(device))
    assert asked
    assert set(asked) == {not waits}
