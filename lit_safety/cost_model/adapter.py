"""The part of the cost model that is trained: a residual adapter on CLIP features and a linear head."""

from __future__ import annotations

from torch import Tensor, nn


class CostAdapter(nn.Module):
    """C(x) = head(f + mlp(f)), f the layer-normalised CLIP features: a CLIP adapter (Gao et al., arXiv 2110.04544).

    The MLP's last layer starts at zero, so that the adapter starts as a linear probe and departs from it as it learns.

    Args:
        features: numbers in a CLIP feature.
        width: hidden units of the MLP.
        dropout: share of hidden units left out in training, in [0, 1).
    """

    def __init__(self, features: int, width: int = 256, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        last, self.head = nn.Linear(width, features), nn.Linear(features, 1)
        for layer in (last, self.head):
            nn.init.zeros_(layer.bias)
            nn.init.zeros_(layer.weight)
        self.mlp = nn.Sequential(nn.Linear(features, width), nn.GELU(), nn.Dropout(dropout), last)

    def adapted(self, features: Tensor) -> Tensor:
        """CLIP features (N, D) -> adapted features (N, D)."""
        normed = self.norm(features)
        return normed + self.mlp(normed)

    def cost(self, adapted: Tensor) -> Tensor:
        """Adapted features (N, D) -> costs (N,), not calibrated."""
        return self.head(adapted).squeeze(1)

    def forward(self, features: Tensor) -> Tensor:
        """CLIP features (N, D) -> costs (N,), not calibrated; above 0 is harmful."""
        return self.cost(self.adapted(features))
