"""The plain denoising loss that attackers train with, every random number a function of seed, step and picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_safety.data.chance import LATENT, NOISE, normal, sample_seed, uniform

if TYPE_CHECKING:
    from lit_safety.backbones import Backbone, Conditioning


def batches(count: int, size: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of row numbers; each pass over the rows has an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < size:
            waiting += torch.randperm(count, generator=generator).tolist()
        yield waiting[:size]
        waiting = waiting[size:]


def denoising_loss(
    backbone: Backbone, posterior: Tensor, conditioning: Conditioning, keys: Sequence[str], seed: int, step: int
) -> Tensor:
    """Mean squared error of the denoiser's prediction, one a picture (B,), fp32.

    Args:
        backbone: predicts.
        posterior: of the pictures' latents (B, 2, C, h, w).
        conditioning: B rows.
        keys: the pictures' names, B.
        seed: of the attack.
        step: which step it is; decides noise and timestep together with seed and name.
    """
    seeds = [sample_seed(seed, step, key) for key in keys]
    shape = tuple(posterior.shape[2:])
    noise, spread = (normal(seeds, purpose, shape).to(posterior.device) for purpose in (NOISE, LATENT))
    fractions = torch.tensor([uniform(s, "timestep") for s in seeds], dtype=torch.float64)
    timesteps = backbone.timesteps(fractions).to(posterior.device)
    latents = backbone.latents(posterior, spread)
    noisy = backbone.add_noise(latents, noise, timesteps)
    target = backbone.target(latents, noise, timesteps)
    return (backbone.predict(noisy, timesteps, conditioning).float() - target.float()).pow(2).flatten(1).mean(1)
