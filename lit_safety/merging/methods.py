"""Arithmetic on products b @ a without computing the product: stacking, exact reduction, truncation. All in fp64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_safety.adapters.low_rank import LowRank
from lit_safety.core.chance import generator, sample_seed
from lit_safety.core.errors import UserError
from lit_safety.merging.options import Statistic


def stack(parts: Sequence[LowRank], weights: Sequence[float | Tensor]) -> LowRank:
    """sum_k weights[k] * delta_k as one product of rank sum_k r_k; scales and weights are multiplied into b.

    Args:
        parts: updates of one layer, (out, in).
        weights: one number for each part, or a column (out, 1) with a weight for each row of its delta.

    A part of weight 0 or rank 0 adds no rank. If a single part is left and its weight is a number, its tensors are
    returned unchanged, so that with weight 1 nothing is rounded.
    """
    kept = [(p, w) for p, w in zip(parts, weights, strict=True) if p.rank and bool(torch.as_tensor(w).count_nonzero())]
    if len(kept) == 1 and not isinstance(kept[0][1], Tensor):
        part, weight = kept[0]
        return LowRank(part.a, part.b, part.scale * float(weight), part.kernel)
    out, inputs = parts[0].shape
    a = torch.cat([part.a.double() for part, _ in kept] or [torch.zeros(0, inputs, dtype=torch.float64)])
    blocks = [part.b.double() * (part.scale * weight) for part, weight in kept]
    b = torch.cat(blocks or [torch.zeros(out, 0, dtype=torch.float64)], dim=1)
    return LowRank(a, b, kernel=parts[0].kernel)


def reduce_rank(layer: LowRank) -> LowRank:
    """The same update with a rank of at most min(out, in): exact up to rounding, by QR of the longer factor."""
    out, inputs = layer.shape
    if layer.rank <= min(out, inputs):
        return layer
    a, b = layer.a.double(), layer.b.double() * layer.scale
    if out < inputs:
        q, rest = torch.linalg.qr(b)  # (out, out), (out, r)
        return LowRank(rest @ a, q, kernel=layer.kernel)
    q, rest = torch.linalg.qr(a.T)  # (in, in), (in, r)
    return LowRank(q.T, b @ rest.T, kernel=layer.kernel)


# The weighted mean of the updates. (The product of the means of A and B would be another update.)


def mean(parts: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """sum_k w_k delta_k / sum_k w_k, exactly, as one LoRA of rank sum_k r_k; a missing layer counts as a zero update.

    Raises:
        UserError: the weights add up to 0.
    """
    total = sum(weights)
    if abs(total) < 1e-12:
        raise UserError(
            f"--weights {list(weights)} add up to {total:g}, but a mean divides by the sum; use --method sum"
        )
    return stack(parts, [weight / total for weight in weights])


# Task arithmetic: the weighted sum of the updates (Ilharco et al., arXiv 2212.04089).


def task_sum(parts: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """sum_k w_k delta_k, exactly, as one LoRA of rank sum_k r_k: a = [a_1; ...], b = [w_1 s_1 b_1 ...]."""
    return stack(parts, weights)


# The best approximation of an update by one of lower rank in the Frobenius norm (Eckart-Young).


#: Singular values below this share of the largest are rounding errors, far below the precision of fp32.
NEGLIGIBLE = 1e-10


def svd_truncate(layer: LowRank, rank: int) -> LowRank:
    """The best update of rank ``rank``; an update of at most this rank is returned unchanged.

    Raises:
        ValueError: ``rank`` is below 1.
    """
    if rank < 1:
        raise ValueError(f"the rank must be at least 1, got {rank}")
    if layer.rank <= rank:
        return layer
    a, b = _leading(layer.a.double(), layer.b.double() * layer.scale, rank)
    return LowRank(a, b, kernel=layer.kernel)


def svd_of_dense(delta: Tensor, rank: int, kernel: tuple[int, ...] = ()) -> LowRank:
    """The same for an update (out, in) that is not a product of factors (the results of TIES and DARE).

    The leading right singular vectors are computed in fp32 as eigenvectors of the smaller Gram matrix, which takes a
    third of the time of an SVD. A projection in fp64 on their images under ``delta`` then restores the precision.
    """
    if delta.shape[0] < delta.shape[1]:
        flipped = svd_of_dense(delta.T, rank)
        return LowRank(flipped.b.T, flipped.a.T, kernel=kernel)
    single, double = delta.float(), delta.double()
    _, vectors = torch.linalg.eigh(single.T @ single)  # ascending
    q, _ = torch.linalg.qr(double @ vectors[:, -rank:].double())  # (out, rank)
    a, b = _leading(q.T @ double, q, rank)
    return LowRank(a, b, kernel=kernel)


def _leading(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The leading part of b @ a, with singular values divided evenly between both factors: a (rank, in), b (out, rank).

    With b = Qb Rb and a^T = Qa Ra only the SVD of Rb Ra^T is needed, which is as small as the factors' rank.
    """
    qb, rb = torch.linalg.qr(b)
    qa, ra = torch.linalg.qr(a.T)
    u, values, v = torch.linalg.svd(rb @ ra.T, full_matrices=False)
    count = min(rank, int((values > NEGLIGIBLE * values[0]).sum()))
    root = values[:count].sqrt()
    return root[:, None] * (v[:count] @ qa.T), (qb @ u[:, :count]) * root


# TIES: trim, elect a sign, average the updates that agree (Yadav et al., arXiv 2306.01708, algorithm 1).


class Updates(Sequence[Tensor]):
    """The whole updates (out, in) of one layer in fp32, each made when it is asked for and not kept.

    A layer of a large model is 0.1 GB in fp32, so that eight experts' updates at once would be most of what a merge
    needs.
    """

    def __init__(self, parts: Sequence[LowRank]) -> None:
        self.parts = list(parts)

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: Any) -> Any:
        return self.parts[index].delta(torch.float32)


def ties(deltas: Sequence[Tensor] | Tensor, density: float, weights: Tensor | None = None) -> Tensor:
    """Merge one layer's updates, entry by entry.

    1. trim: keep the ``density`` share of entries with the largest magnitudes of every update (equal ones at the limit
       are all kept, so that their order does not matter), and set the rest to 0;
    2. elect: the sign of an entry is the sign of the sum over the updates;
    3. merge: the mean over the updates whose entry has that sign; if the sum is 0, the entry is 0.

    The paper trims the updates as a whole. Here every layer is trimmed separately, as common libraries do, so that only
    one layer is in memory.

    Args:
        deltas: K updates (out, in), gone through twice; of `Updates` one at a time is in memory.
        density: share of entries kept, in (0, 1].
        weights: (K,), factors for the updates; None: all 1.

    Returns:
        (out, in), in general of full rank.
    """

    def update(k: int) -> Tensor:
        return deltas[k] if weights is None else deltas[k] * weights.to(deltas[k])[k]

    limits: list[float] = []
    elected: Tensor | None = None
    for k in range(len(deltas)):
        delta = update(k)
        limits.append(_limit(delta, density))
        kept = _trim(delta, limits[k])
        elected = kept if elected is None else elected.add_(kept)
    if elected is None:
        raise ValueError("there is no update to merge")
    sign = elected.sign_()
    total, count = torch.zeros_like(sign), torch.zeros_like(sign)
    for k, limit in enumerate(limits):
        kept = _trim(update(k), limit)
        agrees = kept * sign > 0
        total += kept * agrees
        count += agrees
    return total / count.clamp(min=1)


def _limit(delta: Tensor, density: float) -> float:
    """The smallest magnitude that trimming keeps."""
    dropped = delta.numel() - max(1, round(density * delta.numel()))
    if dropped == 0:
        return 0.0
    # NumPy's selection takes a tenth of the time of torch's.
    return float(np.partition(delta.abs().flatten().cpu().numpy(), dropped)[dropped])


def _trim(delta: Tensor, limit: float) -> Tensor:
    """A tensor of its own in which smaller magnitudes are 0."""
    return delta * (delta.abs() >= limit)


# DARE: drop entries of the updates at random, rescale the rest, then add (Yu et al., arXiv 2311.03099, eq. 3).


def dare(delta: Tensor, drop: float, generator: torch.Generator) -> Tensor:
    """One update (out, in) whose entries are 0 with probability ``drop``, else divided by 1 - drop: the mean stays.

    Args:
        delta: (out, in).
        drop: in [0, 1).
        generator: a CPU generator; the same seed gives the same entries.
    """
    kept = torch.rand(delta.shape, generator=generator) >= drop
    return delta * kept.to(delta) / (1 - drop)


def dare_sum(
    deltas: Sequence[Tensor], weights: Sequence[float], drop: float, seed: int, names: Sequence[str], layer: str
) -> Tensor:
    """sum_k w_k dare(delta_k): (out, in). Seed, expert and layer decide what is dropped, not the order in a list."""
    total: Tensor | None = None
    for delta, weight, name in zip(deltas, weights, names, strict=True):
        chance = generator(sample_seed(seed, 0, name), f"dare {layer}")
        part = weight * dare(delta, drop, chance)
        total = part if total is None else total.add_(part)
    if total is None:
        raise ValueError("there is no update to merge")
    return total


# Co-Merge: every output unit of a layer is taken from the expert that is most active in it.
#
# After SafetyDPO (arXiv 2412.10493), whose merging code is not published. With a[k, i, j] the mean of
# |s_k (B_k A_k x)_j| over the tokens and timesteps of calibration prompt i, row j of the merged update is row j of
# s_k B_k A_k for the expert k that wins it. Rows of the product are chosen, and not rows of A and B separately, because
# the experts' bases are unrelated.
#
# The finer unit is the single weight: |dW_k[j, i]| E|x_i| is what weight (j, i) of expert k contributes on average.
# The result has full rank, so it must be truncated by SVD.


@dataclass
class Activity:
    """How active each of K experts is in each output unit of one layer, summed over the calibration prompts."""

    votes: Tensor
    """(K, out) int64: for how many prompts the expert is the most active one (a tie counts for the first)."""
    total: Tensor
    """(K, out) fp64: the sum of a[k, i, j] over the prompts i."""
    relative_votes: Tensor
    """(K, out): as votes, but of a[k, i, j] / mean_j a[k, i, j]."""
    relative_total: Tensor
    """(K, out): as total, but of a[k, i, j] / mean_j a[k, i, j]."""
    inputs: Tensor
    """(in,) fp64: the sum over the prompts of the mean |x_i| over tokens and timesteps; the same for all experts."""

    @classmethod
    def empty(cls, experts: int, out: int, inputs: int = 0) -> Activity:
        votes = [torch.zeros(experts, out, dtype=torch.int64) for _ in range(2)]
        totals = [torch.zeros(experts, out, dtype=torch.float64) for _ in range(2)]
        return cls(votes[0], totals[0], votes[1], totals[1], torch.zeros(inputs, dtype=torch.float64))

    def add(self, activations: Tensor, inputs: Tensor | None = None) -> None:
        """Add the prompts of a batch: a[k, i, j] as (K, B, out), mean |x| as (B, in). The tensors are not kept."""
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
    """(K, out): for how many of the prompts in (K, B, out) the expert is the most active one; a tie counts for the
    first."""
    first = activations.argmax(dim=0)  # (B, out)
    return torch.nn.functional.one_hot(first, len(activations)).sum(dim=0).T


def owners(activity: Activity, statistic: Statistic, normalise: bool = False) -> Tensor:
    """The expert from which each row is taken: (out,) int64.

    `vote`: the one with the most votes; a tie goes to the larger mean activation, then to the first.
    `magnitude`: the one with the largest mean activation; a tie goes to the first.
    ``normalise``: an expert's activity on a prompt is measured in units of its own mean over the layer's outputs, so
    that the expert with the largest updates does not win everywhere.
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


def comerge_weights(deltas: Sequence[Tensor] | Tensor, inputs: Tensor | None) -> tuple[Tensor, Tensor]:
    """Takes every weight from the expert with the largest |dW_k[j, i]| E|x_i|; a tie goes to the first.

    E|x_i| is the same for all experts, so it has no effect by itself. It has an effect if each expert's product is
    measured in units of its own mean over the layer; giving ``inputs`` selects this.

    Args:
        deltas: the experts' updates, K of (out, in); of `Updates` only one at a time is in memory.
        inputs: E|x_i| (in,) up to a factor, to measure in units of each expert's mean; None: plain magnitudes.

    Returns:
        The update (out, in), in general of full rank, and the expert of each weight (out, in).
    """
    found = deltas[0]
    best, owner = _scores(found, inputs), torch.zeros(found.shape, dtype=torch.int64, device=found.device)
    for k in range(1, len(deltas)):
        delta = deltas[k]
        score = _scores(delta, inputs)
        wins = score > best
        found, best = torch.where(wins, delta, found), torch.where(wins, score, best)
        owner.masked_fill_(wins, k)
    return found, owner


def _scores(delta: Tensor, inputs: Tensor | None) -> Tensor:
    score = delta.abs()
    if inputs is None:
        return score
    score = score * inputs.to(score)
    return score / score.mean().clamp(min=torch.finfo(score.dtype).tiny)
