"""Co-Merge: every output unit of a layer is taken from the expert that it is most active in.

After SafetyDPO (arXiv 2412.10493), whose merging code is not published. With a[k, i, j] the mean of
|s_k (B_k A_k x)_j| over the tokens and timesteps of calibration prompt i, row j of the merged update is row j of
s_k B_k A_k for the expert k that wins it. Rows of the product are chosen, never rows of A and B apart: the experts'
bases have nothing to do with each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_safety.adapters.lora_file import LowRank
from lit_safety.merging.factors import stack
from lit_safety.merging.recipe import Statistic


@dataclass
class Activity:
    """How active each of K experts is in each output unit of one layer, summed up over the calibration prompts."""

    votes: Tensor
    """(K, out) int64: for how many prompts the expert is the most active one (a tie counts for the first)."""
    total: Tensor
    """(K, out) fp64: the sum of a[k, i, j] over the prompts i."""

    @classmethod
    def empty(cls, experts: int, out: int) -> Activity:
        return cls(torch.zeros(experts, out, dtype=torch.int64), torch.zeros(experts, out, dtype=torch.float64))

    def add(self, activations: Tensor) -> None:
        """Count in the prompts of a batch: a[k, i, j] as (K, B, out). Nothing of them is kept."""
        activations = activations.double().cpu()
        first = activations.argmax(dim=0)  # (B, out)
        self.votes += torch.nn.functional.one_hot(first, len(activations)).sum(dim=0).T
        self.total += activations.sum(dim=1)


def owners(activity: Activity, statistic: Statistic) -> Tensor:
    """Which expert every row is taken from: (out,) int64.

    `vote`: the one with the most votes; a tie goes to the larger mean activation, then to the first.
    `magnitude`: the one with the largest mean activation; a tie goes to the first.
    """
    if statistic == "magnitude":
        return activity.total.argmax(dim=0)
    most = activity.votes == activity.votes.max(dim=0).values
    return torch.where(most, activity.total, -1.0).argmax(dim=0)


def comerge(parts: Sequence[LowRank], owner: Tensor) -> LowRank:
    """The update whose row j is that of part ``owner[j]``: exactly one LoRA, a = [a_1; ...], b = [M_1 s_1 b_1 ...].

    M_k is the 0/1 diagonal matrix of the rows that part k owns. A part that owns none takes no rank.
    """
    masks = [(owner == k).double()[:, None] for k in range(len(parts))]
    whole = [1.0 if bool(mask.all()) else mask for mask in masks]
    return stack(parts, whole)
