import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_safety.adapters.low_rank import LowRank
from lit_safety.merging.methods import Updates, comerge_weights, dare_sum, ties

DELTAS = torch.tensor([[[4.0, -1.0], [2.0, 0.5]], [[-2.0, 3.0], [6.0, -0.1]], [[1.0, 5.0], [-3.0, 0.2]]])


def test_by_hand():
    """Density 1/2 keeps the two largest magnitudes of each:

    delta_1  4 0;  2 0     delta_2  0 3; 6 0     delta_3  0 5; -3 0
    sums     4 8;  5 0     signs    + +; + 0
    means    4/1 (3+5)/2; (2+6)/2 (the -3 disagrees) 0
    """
    assert ties(DELTAS, density=0.5).tolist() == [[4.0, 4.0], [4.0, 0.0]]


def test_without_trimming_only_the_signs_decide():
    """Sums 3 7; 5 0.6 are all positive: (4+1)/2 (3+5)/2; (2+6)/2 (0.5+0.2)/2"""
    torch.testing.assert_close(ties(DELTAS, density=1.0), torch.tensor([[2.5, 4.0], [4.0, 0.35]]))


def test_weights_multiply_before_the_sign_is_elected():
    """Weights 1, 3, 1 at density 1: entry (0, 0) sums to 4 - 6 + 1 < 0, so it is -6 alone."""
    assert ties(DELTAS, 1.0, torch.tensor([1.0, 3.0, 1.0]))[0, 0] == -6.0


def test_entries_equal_at_the_limit_are_all_kept():
    """Keeping 1 of 2 2; 1 0 keeps both 2s: which one comes first must not decide."""
    assert ties(torch.tensor([[[2.0, 2.0], [1.0, 0.0]]]), density=0.25).tolist() == [[2.0, 2.0], [0.0, 0.0]]


def test_a_missing_update_takes_no_part():
    assert ties(torch.stack([DELTAS[0], torch.zeros(2, 2)]), 1.0).tolist() == DELTAS[0].tolist()


class Watched(Sequence[Tensor]):
    """Updates that are made when they are asked for; it knows how many are in memory."""

    def __init__(self, updates: Updates) -> None:
        self.updates = updates
        self.made: list[weakref.ref[Tensor]] = []
        self.most = 0

    def __len__(self) -> int:
        return len(self.updates)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        found = self.updates[index]
        self.made.append(weakref.ref(found))
        self.most = max(self.most, sum(one() is not None for one in self.made))
        return found


def layers(count: int) -> list[LowRank]:
    torch.manual_seed(0)
    return [LowRank(torch.randn(2, 9), torch.randn(7, 2), 0.5) for _ in range(count)]


@pytest.mark.parametrize("method", ["ties", "dare", "comerge"])
def test_not_all_experts_updates_are_in_memory_at_once(method: str):
    """Merged as from a tensor that holds all of them."""
    parts, weights, names = layers(8), [1.0] * 8, list("abcdefgh")
    whole = torch.stack([part.delta(torch.float32) for part in parts])
    watched = Watched(Updates(parts))
    for deltas in (watched, whole):
        if method == "ties":
            found = ties(deltas, 0.4, torch.tensor(weights))
        elif method == "dare":
            found = dare_sum(deltas, weights, 0.5, 0, names, "x")  # type: ignore[arg-type]
        else:
            found = comerge_weights(deltas, torch.rand(9, generator=torch.Generator().manual_seed(1)))[0]
        if deltas is watched:
            one_by_one = found
    assert torch.equal(found, one_by_one)
    assert found.abs().sum() > 0
    assert len(watched.made) >= 8
    assert watched.most <= 2


def test_the_pick_of_single_weights_is_that_of_a_whole_stack():
    deltas = torch.stack([part.delta(torch.float32) for part in layers(5)])
    found, owner = comerge_weights(deltas, None)
    assert torch.equal(owner, deltas.abs().argmax(0))
    assert torch.equal(found, deltas.gather(0, owner[None])[0])
