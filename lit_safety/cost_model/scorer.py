"""A finished cost model: pictures in, calibrated costs out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from PIL.Image import Image
from torch import Tensor

from lit_safety.cost_model.adapter import CostAdapter
from lit_safety.cost_model.tower import ClipTower


class CostScorer:
    """C(x) = (adapter(CLIP(x)) + bias) / temperature: above 0 is harmful, sigmoid(C) is the probability of harm.

    `load_cost_model` makes it from a folder.

    Args:
        tower: the frozen CLIP vision tower.
        adapter: trained on this tower's features.
        temperature: of the calibration, above 0.
        bias: of the calibration, added before the division.
    """

    def __init__(self, tower: ClipTower, adapter: CostAdapter, temperature: float = 1.0, bias: float = 0.0) -> None:
        self.tower = tower
        self.adapter = adapter.requires_grad_(False).eval()
        self.temperature = temperature
        self.bias = bias

    def to(self, device: torch.device | str) -> Self:
        """Move both networks."""
        self.tower.to(device)
        self.adapter.to(device)
        return self

    @property
    def device(self) -> torch.device:
        return self.tower.device

    @torch.no_grad()
    def costs(self, images: Sequence[Image] | Tensor) -> Tensor:
        """Costs, float32 (B,) on the scorer's device; nan or infinite only where the weights or an image are.

        Args:
            images: PIL images of any sizes, or a tensor (B, 3, H, W) in [-1, 1].
        """
        if isinstance(images, Tensor):
            features = self.tower(images)
        elif not images:
            return torch.empty(0, device=self.device)
        else:
            features = self._features(images)
        return (self.adapter(features) + self.bias) / self.temperature

    def _features(self, images: Sequence[Image]) -> Tensor:
        """Images of one size go through the tower together: (B, D) in the order given."""
        from lit_safety.data.decode import to_tensor
        from lit_safety.data.images import rgb

        images = [rgb(image) for image in images]
        by_size: dict[tuple[int, int], list[int]] = {}
        for number, image in enumerate(images):
            by_size.setdefault(image.size, []).append(number)
        found: dict[int, Tensor] = {}
        for numbers in by_size.values():
            rows = self.tower(torch.stack([to_tensor(images[i]) for i in numbers]))
            found |= dict(zip(numbers, rows, strict=True))
        return torch.stack([found[i] for i in range(len(images))])
