"""Anchored RegMean: an update that acts like each expert on the expert's inputs, and does nothing on clean inputs.

W_k (out, in) is expert k's update of a layer, X_k are the layer's inputs on its prompts, X_0 those on prompts of what
must stay. The update

    dW = (sum_k l_k W_k G_k) (sum_k l_k G_k + mu c G_0 + epsilon t I)^-1

minimises sum_k l_k |(dW - W_k) X_k|^2 + mu c |dW X_0|^2 + epsilon t |dW|^2, with the Gram matrices G = X X^T / tokens
and

    l_k = |W_k|^2 / tr(W_k G_k W_k^T), so that all experts count equally, and 0 if an expert does nothing in the layer
    c = tr(sum_k l_k G_k) / tr(G_0), so that mu has no unit
    t = tr(the matrix before the ridge) / in

With mu = 0, epsilon = 0 and all l_k = 1 it is RegMean (arXiv 2212.09849). The columns of dW are in the span of the B_k,
so it is exactly one LoRA of rank sum_k r_k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_safety.adapters.low_rank import LowRank, squared_norm

#: An expert does nothing in a layer if its update is smaller on its own inputs than on isotropic ones by this factor.
NOTHING = 1e-12


@dataclass(frozen=True)
class Grams:
    """Gram matrices (in, in) of one layer's inputs, each divided by its number of tokens."""

    own: tuple[Tensor, ...]
    """For each expert: on its own prompts and with this expert, in the order of the experts; empty if not needed."""
    anchor: Tensor
    """On prompts of what must stay, with the base."""


def anchored(
    parts: Sequence[LowRank],
    grams: Grams,
    mu: float,
    epsilon: float,
    weights: Sequence[float] | None = None,
) -> LowRank:
    """The merged update of one layer, in fp64; rank 0 if no expert does anything.

    Args:
        parts: every expert's update (out, in); one that does not adapt the layer has rank 0.
        grams: Gram matrices of the layer's inputs.
        mu: weight of what must stay; 0: it does not count.
        epsilon: ridge, in units of the mean eigenvalue.
        weights: factors for the l_k; None: all 1.
    """
    out, size = parts[0].shape
    total = torch.zeros(size, size, dtype=torch.float64)
    left, right = [], []
    for part, own, weight in zip(parts, grams.own, weights or [1.0] * len(parts), strict=True):
        gram = own.double()
        strength = weight * balance(part, gram)
        if strength > 0:
            total += strength * gram
            left.append(part.b.double())
            right.append((strength * part.scale) * (part.a.double() @ gram))
    if not left:
        return LowRank(total.new_zeros(0, size), total.new_zeros(out, 0), kernel=parts[0].kernel)
    anchor = grams.anchor.double()
    unit = float(anchor.trace())
    if mu and unit > 0:
        total += (mu * float(total.trace()) / unit) * anchor
    ridge = epsilon * float(total.trace()) / size
    return LowRank(
        _solve(total, ridge, torch.cat(right).T).T.contiguous(), torch.cat(left, dim=1), 1.0, parts[0].kernel
    )


def balance(part: LowRank, gram: Tensor) -> float:
    """l_k = |W|^2 / tr(W G W^T); 0 if the expert does nothing in the layer or on these inputs.

    Args:
        part: the expert's update.
        gram: (in, in) in fp64.
    """
    norm = squared_norm(part)
    a, b = part.a.double(), part.b.double()
    done = float(((b.T @ b) * (a @ gram @ a.T)).sum()) * part.scale**2
    mean = float(gram.trace()) / len(gram)
    return norm / done if done > NOTHING * norm * mean and norm > 0 else 0.0


def _solve(matrix: Tensor, ridge: float, right: Tensor) -> Tensor:
    """(matrix + ridge I)^-1 right, for a matrix whose eigenvalues are negative only by rounding errors."""
    raised = matrix.clone()
    raised.diagonal().add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(raised)
    if not int(failed):
        return torch.cholesky_solve(right, factor)
    # Gram matrices are summed in fp32: in wide layers an eigenvalue can be so far below 0 that the ridge is not enough.
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp(min=0) + ridge
    kept = values > values[-1] * 1e-15
    vectors = vectors[:, kept]
    solved: Tensor = vectors @ ((vectors.T @ right) / values[kept, None])
    return solved
