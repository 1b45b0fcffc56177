"""What every model family must offer. A new family is one subclass and one line in `load.py`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

#: Text encoders' outputs by the name of the denoiser's argument; every tensor's first dimension is the batch.
Conditioning = dict[str, Tensor]


class Backbone(nn.Module, ABC):
    """A frozen text-to-image model, split into the parts that training needs.

    ``denoiser`` is the network that is aligned; the text encoders and the image encoder stay frozen.
    """

    denoiser: nn.Module

    @classmethod
    @abstractmethod
    def from_pretrained(cls, source: str) -> Backbone:
        """Load from a pipeline folder or a hub id, in fp32."""

    @abstractmethod
    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        """B prompts -> conditioning of B rows. An empty prompt gives what inference uses for no prompt."""

    @abstractmethod
    def latent_shape(self, images: Tensor) -> tuple[int, ...]:
        """The shape (C, h, w) of one image's latents; images: (B, 3, H, W)."""

    @abstractmethod
    def encode_images(self, images: Tensor, noise: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> scaled latents (B, C, h, w), sampled with ``noise`` (B, C, h, w)."""

    @abstractmethod
    def timesteps(self, uniform: Tensor) -> Tensor:
        """Uniform numbers in [0, 1) (B,) -> training timesteps (B,) in the family's own unit."""

    @abstractmethod
    def timestep_fraction(self, timesteps: Tensor) -> Tensor:
        """Timesteps (B,) -> their place in [0, 1), 0 at the clean end; for logging by bins."""

    @abstractmethod
    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The forward process: x_t (B, C, h, w)."""

    @abstractmethod
    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser is trained to predict at x_t: (B, C, h, w)."""

    @abstractmethod
    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The denoiser's prediction (B, C, h, w)."""

    @abstractmethod
    def pipeline(self) -> Any:
        """A stock diffusers pipeline around these very weights (shared, not copied), for drawing."""

    @abstractmethod
    def save_lora(self, folder: Path, adapter: str) -> None:
        """Write one LoRA adapter of the denoiser as the file that stock ``load_lora_weights`` reads."""
