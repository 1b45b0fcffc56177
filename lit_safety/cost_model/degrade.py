"""Degraded views of training images, because a generator's images are less clean than photographs or drawn scenes.

A view is a pure function of the sample's key and the view's number. It is the same for both images of a pair, in every
epoch and run. So the CLIP features of all views can be computed once, and training on them is the same as on images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_safety.core.chance import normal, sample_seed, uniform
from lit_safety.core.errors import UserError


@dataclass
class Degradation:
    """How training images are degraded; view 0 is always the image itself.

    Args:
        views: degraded views of each image in addition to the image itself; 0: none.
        blur: largest factor by which a view is shrunk before it is enlarged again, at least 1.
        contrast: contrast lies within 1 - contrast and 1 + contrast.
        noise: largest standard deviation of added noise, where an image spans [-1, 1].
    """

    views: int = 4
    blur: float = 2.0
    contrast: float = 0.15
    noise: float = 0.3

    def __post_init__(self) -> None:
        if self.views < 0 or self.blur < 1 or not 0 <= self.contrast < 1 or self.noise < 0:
            raise UserError(
                f"model.init_args.degradation: {self}: views >= 0, blur >= 1, contrast in [0, 1), noise >= 0"
            )

    @property
    def all(self) -> range:
        """The numbers of all views; 0 is the image itself."""
        return range(self.views + 1)

    def __call__(self, images: Tensor, keys: Sequence[str], views: Sequence[int]) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] of the samples ``keys`` -> one view of each, of the same shape and range."""
        pairs = zip(images, keys, views, strict=True)
        return torch.stack([self._view(image, sample_seed(0, view, key), view) for image, key, view in pairs])

    def _view(self, image: Tensor, seed: int, view: int) -> Tensor:
        if view == 0:
            return image
        contrast = uniform(seed, "contrast", 1 - self.contrast, 1 + self.contrast)
        # Squared, so that most views get little noise and a few get much.
        sigma = self.noise * uniform(seed, "noise-level") ** 2
        noise = normal([seed], "noise", image.shape)[0].to(image)
        return (self._blurred(image, seed) * contrast + noise * sigma).clamp(-1, 1)

    def _blurred(self, image: Tensor, seed: int) -> Tensor:
        height, width = image.shape[-2:]
        factor = uniform(seed, "blur", 1.0, self.blur)
        small = (max(1, round(height / factor)), max(1, round(width / factor)))
        if small == (height, width):
            return image
        shrunk = F.interpolate(image[None], small, mode="bilinear", antialias=True, align_corners=False)
        return F.interpolate(shrunk, (height, width), mode="bicubic", align_corners=False)[0]
