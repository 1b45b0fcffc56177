"""Merging in the space spanned by the experts' factors, the null space of clean inputs, and SVC. All in fp64.

The core: U and V are orthonormal bases of the spaces spanned by all B_k and all A_k. Then W_k = U M_k V^T, and merging
the small M_k merges the W_k. The bases come from the factors that are merged: after a projection on the null space of
clean inputs from the projected A_k (with bases of the original A_k the core would lose most of an update).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_safety.adapters.low_rank import LowRank
from lit_safety.merging.methods import NEGLIGIBLE

#: An expert does not contribute to a direction if its row is smaller than the merged row by this factor.
NO_PART = 1e-3


def null_space(gram: Tensor, share: float) -> Tensor:
    """Directions that clean inputs do not use, as columns (in, n); n can be 0; without clean inputs n is `in`.

    Eigenvectors of ``gram`` (in, in) whose eigenvalue is below ``share`` of the largest.
    """
    values, vectors = torch.linalg.eigh(gram.double())
    unused = values < share * values[-1] if float(values[-1]) > 0 else torch.ones_like(values, dtype=torch.bool)
    found: Tensor = vectors[:, unused]
    return found


def project(part: LowRank, directions: Tensor) -> LowRank:
    """W P, with P the projection on ``directions`` (in, n), orthonormal columns. Only A changes; the rank stays."""
    a = (part.a.double() @ directions) @ directions.T
    return LowRank(a, part.b.double(), part.scale, part.kernel)


@dataclass(frozen=True)
class Core:
    """Updates of one layer in the space that they span: W_k = left @ small[k] @ right.T."""

    left: Tensor
    """(out, p), orthonormal columns."""
    right: Tensor
    """(in, q), orthonormal columns."""
    small: Tensor
    """(K, p, q)"""

    @classmethod
    def of(cls, parts: Sequence[LowRank], weights: Sequence[float]) -> Core:
        """The core of the updates that are not 0, each multiplied by its weight; p = q = 0 if all are 0."""
        kept = [(part, weight * part.scale) for part, weight in zip(parts, weights, strict=True)]
        kept = [(part, factor) for part, factor in kept if factor and bool(part.a.any()) and bool(part.b.any())]
        out, inputs = parts[0].shape
        left = _basis(torch.cat([part.b.double() for part, _ in kept] or [torch.zeros(out, 0).double()], dim=1))
        right = _basis(torch.cat([part.a.double() for part, _ in kept] or [torch.zeros(0, inputs).double()]).T)
        small = [factor * (left.T @ part.b.double()) @ (part.a.double() @ right) for part, factor in kept]
        return cls(left, right, torch.stack(small) if small else torch.zeros(0, 0, 0).double())

    def whole(self, u: Tensor, values: Tensor, v: Tensor, kernel: tuple[int, ...]) -> LowRank:
        """left u diag(values) v^T right^T as factors; u (p, n), values (n,), v (q, n)."""
        root = values.abs().sqrt()
        a, b = root[:, None] * (self.right @ v).T, (self.left @ u) * (root * values.sign())
        return LowRank(a, b, kernel=kernel)


def tsv_m(parts: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """TSV-M (arXiv 2412.00081): the leading singular vectors of every update, made orthogonal to the others'.

    Each of K updates keeps floor(R / K) singular triplets (at least 1, none with a singular value of 0), where R is the
    rank of the core. The stacked left and right vectors are replaced by the nearest matrices with orthonormal columns.
    """
    core = Core.of(parts, weights)
    if not len(core.small):
        return _zero_update(parts[0])
    count = max(1, min(core.small.shape[1:]) // len(core.small))
    us, values, vs = [], [], []
    for update in core.small:
        u, sizes, v = torch.linalg.svd(update, full_matrices=False)
        kept = min(count, int((sizes > NEGLIGIBLE * sizes[0]).sum()))
        us.append(u[:, :kept])
        values.append(sizes[:kept])
        vs.append(v[:kept].T)
    return core.whole(_nearest(torch.cat(us, 1)), torch.cat(values), _nearest(torch.cat(vs, 1)), parts[0].kernel)


def iso_c(parts: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """Iso-C (arXiv 2502.04959): the sum of the updates with all its singular values set to their mean.

    Only singular values above 0 count: directions that the sum does not use do not enter the mean and stay unused.
    """
    core = Core.of(parts, weights)
    if not len(core.small):
        return _zero_update(parts[0])
    total = core.small.sum(dim=0)
    u, sizes, v = torch.linalg.svd(total, full_matrices=False)
    kept = int((sizes > NEGLIGIBLE * torch.linalg.matrix_norm(core.small).max()).sum())
    if not kept:  # the updates cancel
        return _zero_update(parts[0])
    return core.whole(u[:, :kept], sizes[:kept].mean().expand(kept), v[:kept].T, parts[0].kernel)


def svc(merged: LowRank | Tensor, parts: Sequence[LowRank], weights: Sequence[float], alpha: float) -> LowRank:
    """Singular value calibration (arXiv 2602.05536): lowers singular values of directions that several experts share.

    A merge counts such directions several times. For each left singular vector u_r of the merged update, with a = u_r^T
    dW and a_k = u_r^T W_k:

        s_k = <a, a_k> / |a_k|^2        sigma_r <- sigma_r K / sum_k max(alpha, s_k)

    s_k = alpha if |a_k| is below `NO_PART` times |a|: otherwise 0/0 or a rounding error would remove the direction.

    Args:
        merged: factors, or a matrix (out, in).
        parts: the experts' updates; K counts those that are not 0.
        weights: factors for the updates.
        alpha: 1 after a sum, 1/K after a mean. With 1/K a sum would become several times too large.
    """
    kernel = parts[0].kernel
    if isinstance(merged, Tensor):
        u, sizes, v = torch.linalg.svd(merged.double(), full_matrices=False)
        v = v.T
    else:
        core = Core.of([merged], [1.0])
        small = core.small[0] if len(core.small) else torch.zeros(0, 0).double()
        inner, sizes, turned = torch.linalg.svd(small, full_matrices=False)
        u, v = core.left @ inner, core.right @ turned.T
    kept = int((sizes > NEGLIGIBLE * sizes[0]).sum()) if len(sizes) else 0
    u, sizes, v = u[:, :kept], sizes[:kept], v[:, :kept]
    known = [(part, w * part.scale) for part, w in zip(parts, weights, strict=True)]
    known = [(part, factor) for part, factor in known if factor and bool(part.a.any()) and bool(part.b.any())]
    counted = sizes.new_zeros(kept)
    for part, factor in known:
        row = factor * (u.T @ part.b.double()) @ part.a.double()  # (kept, in)
        norm = row.square().sum(dim=1)
        along = (row * v.T).sum(dim=1) * sizes
        negligible = norm <= (NO_PART * sizes) ** 2
        share = torch.where(negligible, sizes.new_tensor(alpha), along / norm.clamp(min=1e-300))
        counted += share.clamp(min=alpha)
    if known:
        sizes = sizes * (len(known) / counted)
    root = sizes.sqrt()
    return LowRank(root[:, None] * v.T, u * root, kernel=kernel)


def _basis(columns: Tensor) -> Tensor:
    """Orthonormal columns that span those of a matrix (n, m): (n, rank)."""
    if not columns.shape[1]:
        return columns
    u, sizes, _ = torch.linalg.svd(columns, full_matrices=False)
    found: Tensor = u[:, : int((sizes > NEGLIGIBLE * sizes[0]).sum())]
    return found


def _nearest(stacked: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns (orthonormal rows if it is wider than high)."""
    u, _, v = torch.linalg.svd(stacked, full_matrices=False)
    found: Tensor = u @ v
    return found


def _zero_update(part: LowRank) -> LowRank:
    out, inputs = part.shape
    empty = torch.zeros(0, 0, dtype=torch.float64)
    return LowRank(empty.new_zeros(0, inputs), empty.new_zeros(out, 0), kernel=part.kernel)
