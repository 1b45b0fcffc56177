"""The update that a LoRA adds to one layer, from any kind of file."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """The update of one layer: delta = scale * b @ a. Rank 0 is the zero update."""

    a: Tensor
    """(r, in); of a convolution in = in_channels * kh * kw."""
    b: Tensor
    """(out, r)"""
    scale: float = 1.0
    """alpha / r, or alpha / sqrt(r) if the file states that it is rank-stabilised."""
    kernel: tuple[int, ...] = ()
    """(kh, kw) of a convolution; empty for a linear layer."""

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        return self.b.shape[0], self.a.shape[1]

    def delta(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The whole update, (out, in)."""
        return (self.b.to(dtype) @ self.a.to(dtype)) * self.scale


def factors_of(layer: LowRank) -> tuple[Tensor, Tensor]:
    """A and B in the shapes of PEFT's layers: of a convolution A has its kernels, and B kernels of 1 x 1."""
    ones = (1,) * len(layer.kernel)
    channels = layer.shape[1] // math.prod(layer.kernel)
    a = layer.a.reshape(layer.rank, channels, *layer.kernel).contiguous()
    return a, layer.b.reshape(layer.shape[0], layer.rank, *ones).contiguous()


def squared_norm(layer: LowRank) -> float:
    """The squared Frobenius norm of the update: tr(b'b aa')."""
    a, b = layer.a.double(), layer.b.double()
    return float(((b.T @ b) * (a @ a.T)).sum()) * layer.scale**2
