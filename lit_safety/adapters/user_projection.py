"""A user's embedding as tokens that the denoiser attends to.

Personalized Safety Alignment (arXiv 2508.01151): Linear -> (B, N, d_ctx) -> LayerNorm. Two things are ours. Embeddings
are standardised first: those of a language model point nearly the same way (mutual cosine 0.995), so that raw ones tell
users apart by their last digits only. And there is a learned null user, for guidance and for unknown users.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def statistics(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (D,) of embeddings (U, D), float32; a constant dimension gets a deviation of 1.

    Raises:
        ValueError: there are fewer than two embeddings.
    """
    if len(embeddings) < 2:
        raise ValueError("standardisation needs the embeddings of two users or more")
    exact = embeddings.double()
    mean, std = exact.mean(0), exact.std(0)
    # Rounding leaves some deviation where all users agree; dividing by it would blow noise up.
    constant = std <= 1e-6 * mean.abs().clamp_min(1e-6)
    return mean.float(), std.masked_fill(constant, 1.0).float()


class UserProjection(nn.Module):
    """(B, D) embeddings -> (B, N, d_ctx) user tokens, in fp32 whatever the rest of the network computes in.

    Args:
        embedding_dim: D.
        context_dim: d_ctx, the width of what the denoiser's cross-attention attends to.
        tokens: N.
        device: where the weights are made.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, embedding_dim: int, context_dim: int, tokens: int = 4, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": torch.float32}
        self.linear = nn.Linear(embedding_dim, tokens * context_dim, **factory)
        self.norm = nn.LayerNorm(context_dim, **factory)
        #: The null user before the LayerNorm, (N, d_ctx).
        self.null_tokens = nn.Parameter(torch.randn(tokens, context_dim, **factory))
        self.register_buffer("mean", torch.zeros(embedding_dim, **factory))
        self.register_buffer("std", torch.ones(embedding_dim, **factory))
        #: Layers of the LoRA that was loaded with it; without them the user's bounds would not hold.
        self.lora_layers: tuple[str, ...] = ()

    @property
    def embedding_dim(self) -> int:
        return self.linear.in_features

    @property
    def tokens(self) -> int:
        return self.null_tokens.shape[0]

    @property
    def context_dim(self) -> int:
        return self.null_tokens.shape[1]

    def standardise_by(self, embeddings: Tensor) -> None:
        """Take mean and deviation from the training users' embeddings (U, D)."""
        mean, std = statistics(embeddings)
        self.mean.copy_(mean)
        self.std.copy_(std)

    def forward(self, users: Tensor, known: Tensor | None = None) -> Tensor:
        """User tokens.

        Args:
            users: embeddings (B, D); what stands in the rows of unknown users does not matter.
            known: bool (B,); False gives the null user. None: all are known.

        Returns:
            float32 (B, N, d_ctx). Every parameter takes part, whoever is known: no rank waits for a gradient.
        """
        with torch.autocast(users.device.type, enabled=False):
            unknown = torch.zeros(len(users), dtype=torch.bool, device=users.device) if known is None else ~known
            standardised = (users.float() - self.mean) / self.std
            # Not only in the end: a NaN in an unknown user's row would reach the gradient as 0 * NaN.
            standardised = standardised.masked_fill(unknown[:, None], 0.0)
            tokens = self.linear(standardised).unflatten(-1, (self.tokens, self.context_dim))
            return self.norm(torch.where(unknown[:, None, None], self.null_tokens, tokens))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> UserProjection:
        """Moves to devices, but stays in fp32 when the network around it is halved.

        Half the digits of a mean would be lost, and what tells users apart with them.
        """

        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype != tensor.dtype else moved

        return super()._apply(keep, recurse)
