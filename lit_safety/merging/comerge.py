"""Co-Merge: every output unit of a layer is taken from the expert that it is most active in.

After SafetyDPO (arXiv 2412.10493), whose merging code is not published. With a[k, i, j] the mean of
|s_k (B_k A_k x)_j| over the tokens and timesteps of calibration prompt i, row j of the merged update is row j of
s_k B_k A_k for the expert k that wins it. Rows of the product are chosen, never rows of A and B apart: the experts'
bases have nothing to do with each other.

The finer unit is the single weight: |dW_k[j, i]| E|x_i| is what weight (j, i) of expert k contributes on average. Such
a pick is of full rank, so it is for truncation by SVD only.
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
    relative_votes: Tensor
    """(K, out): as votes, of a[k, i, j] / mean_j a[k, i, j]."""
    relative_total: Tensor
    """(K, out): as total, of the same."""
    inputs: Tensor
    """(in,) fp64: the sum over the prompts of the mean |x_i| over tokens and timesteps; the same for all experts."""

    @classmethod
    def empty(cls, experts: int, out: int, inputs: int = 0) -> Activity:
        votes = [torch.zeros(experts, out, dtype=torch.int64) for _ in range(2)]
        totals = [torch.zeros(experts, out, dtype=torch.float64) for _ in range(2)]
        return cls(votes[0], totals[0], votes[1], totals[1], torch.zeros(inputs, dtype=torch.float64))

    def add(self, activations: Tensor, inputs: Tensor | None = None) -> None:
        """Count in the prompts of a batch: a[k, i, j] as (K, B, out), mean |x| as (B, in). Nothing of them is kept."""
        activations = activations.double().cpu()
        # An expert that does nothing in the layer stays at 0.
        relative = activations / activations.mean(dim=2, keepdim=True).clamp(min=1e-300)
        self.votes += _votes(activations)
        self.total += activations.sum(dim=1)
        self.relative_votes += _votes(relative)
        self.relative_total += relative.sum(dim=1)
        if inputs is not None:
            self.inputs += inputs.double().cpu().sum(dim=0)


def _votes(activations: Tensor) -> Tensor:
    """(K, out): for how many of the prompts in (K, B, out) the expert is the most active one; a tie is the first's."""
    first = activations.argmax(dim=0)  # (B, out)
    return torch.nn.functional.one_hot(first, len(activations)).sum(dim=0).T


def owners(activity: Activity, statistic: Statistic, normalise: bool = False) -> Tensor:
    """Which expert every row is taken from: (out,) int64.

    `vote`: the one with the most votes; a tie goes to the larger mean activation, then to the first.
    `magnitude`: the one with the largest mean activation; a tie goes to the first.
    ``normalise``: an expert's activity on a prompt counts in units of its own mean over the layer's outputs, so that
    the one with the largest updates does not win everywhere.
    """
    votes, total = activity.votes, activity.total
    if normalise:
        votes, total = activity.relative_votes, activity.relative_total
    if statistic == "magnitude":
        return total.argmax(dim=0)
    return torch.where(votes == votes.max(dim=0).values, total, -1.0).argmax(dim=0)


def comerge(parts: Sequence[LowRank], owner: Tensor) -> LowRank:
    """The update whose row j is that of part ``owner[j]``: exactly one LoRA, a = [a_1; ...], b = [M_1 s_1 b_1 ...].

    M_k is the 0/1 diagonal matrix of the rows that part k owns. A part that owns none takes no rank.
    """
    masks = [(owner == k).double()[:, None] for k in range(len(parts))]
    whole = [1.0 if bool(mask.all()) else mask for mask in masks]
    return stack(parts, whole)


def comerge_weights(deltas: Tensor, inputs: Tensor | None) -> tuple[Tensor, Tensor]:
    """Every weight from the expert for which |dW_k[j, i]| E|x_i| is largest; a tie goes to the first.

    E|x_i| is the same for all experts and decides nothing by itself. It does where each expert's product counts in
    units of its own mean over the layer, which is what ``inputs`` asks for.

    Args:
        deltas: the experts' updates (K, out, in).
        inputs: E|x_i| (in,) up to a factor, to count in units of each expert's mean; None: plain magnitudes.

    Returns:
        The update (out, in), in general of full rank, and whose each weight is (out, in).
    """
    score = deltas.abs()
    if inputs is not None:
        score = score * inputs.to(score)
        score = score / score.mean(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(score.dtype).tiny)
    owner = score.argmax(dim=0)
    return deltas.gather(0, owner[None])[0], owner
