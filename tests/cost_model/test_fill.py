from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lit_safety.core.errors import UserError
from lit_safety.cost_model.fill import fill_costs
from lit_safety.data.format.sample import PairMetadata, Sides
from lit_safety.data.reading.batch import Pair, PairBatch, collate


class Brightness:
    """In a cost model's place: the cost is the image's mean; counts the images it was asked for."""

    def __init__(self) -> None:
        self.asked = 0

    def costs(self, images: Tensor) -> Tensor:
        self.asked += len(images)
        return images.mean((1, 2, 3))


def batch() -> PairBatch:
    """Pairs a, b, c of plain images -0.1 i and 0.1 i; b has costs 5 and 6."""

    def pair(i: int, key: str) -> Pair:
        cost = Sides(5.0, 6.0) if key == "b" else None
        images = [torch.full((3, 4, 4), sign * 0.1 * i) for sign in (-1, 1)]
        return Pair(key, i, PairMetadata("a cat", "clean", cost=cost), *images, where=key)

    return collate([pair(i, key) for i, key in enumerate("abc", start=1)])


def test_only_what_is_unknown_is_filled_and_once_a_pair():
    scorer, memory = Brightness(), {}
    given = batch()
    filled = fill_costs(given, scorer, memory)  # type: ignore[arg-type]
    expected = torch.tensor([[-0.1, 0.1], [5.0, 6.0], [-0.3, 0.3]])
    assert torch.allclose(filled.cost, expected)
    assert filled.has_cost == [True] * 3
    assert given.has_cost == [False, True, False]
    assert given.cost[0].isnan().all()
    assert scorer.asked == 4
    again = fill_costs(batch(), scorer, memory)  # type: ignore[arg-type]
    assert torch.allclose(again.cost, expected)
    assert scorer.asked == 4


def test_a_batch_with_all_costs_is_returned_as_it_is():
    full = fill_costs(batch(), Brightness(), {})  # type: ignore[arg-type]
    assert fill_costs(full, Brightness(), {}) is full  # type: ignore[arg-type]


def test_a_pair_that_cannot_be_scored_is_named():
    with pytest.raises(UserError, match="sample a has neither costs nor images"):
        fill_costs(replace(batch(), chosen=None, rejected=None), Brightness(), {})  # type: ignore[arg-type]
    broken = batch()
    assert broken.rejected is not None
    broken.rejected[2] = float("nan")
    with pytest.raises(UserError, match="sample c: its cost is not finite"):
        fill_costs(broken, Brightness(), {})  # type: ignore[arg-type]
