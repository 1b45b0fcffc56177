"""The best approximation of an update by one of lower rank in the Frobenius norm (Eckart-Young)."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_safety.adapters.lora_file import LowRank

#: Singular values below this share of the largest are rounding, far below what fp32 can hold.
NEGLIGIBLE = 1e-10


def svd_truncate(layer: LowRank, rank: int) -> LowRank:
    """The best update of rank ``rank``; an update whose rank is no higher is returned as it is.

    Raises:
        ValueError: if ``rank`` is below 1.
    """
    if rank < 1:
        raise ValueError(f"the rank must be at least 1, got {rank}")
    if layer.rank <= rank:
        return layer
    a, b = _leading(layer.a.double(), layer.b.double() * layer.scale, rank)
    return LowRank(a, b, kernel=layer.kernel)


def svd_of_dense(delta: Tensor, rank: int, kernel: tuple[int, ...] = ()) -> LowRank:
    """The same for an update (out, in) that is no product of factors (what TIES and DARE leave).

    The leading right singular vectors come out of the eigenvectors of the smaller Gram matrix in fp32, which costs a
    third of an SVD; projecting on what ``delta`` makes of them, in fp64, takes back what that loses.
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
    """The leading part of b @ a, singular values shared out evenly: a (rank, in), b (out, rank).

    b = Qb Rb and a^T = Qa Ra, so that the SVD is only that of Rb Ra^T, whose size is that of the factors' rank.
    """
    qb, rb = torch.linalg.qr(b)
    qa, ra = torch.linalg.qr(a.T)
    u, values, v = torch.linalg.svd(rb @ ra.T, full_matrices=False)
    count = min(rank, int((values > NEGLIGIBLE * values[0]).sum()))
    root = values[:count].sqrt()
    return root[:, None] * (v[:count] @ qa.T), (qb @ u[:, :count]) * root
