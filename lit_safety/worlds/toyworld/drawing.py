"""Images from the toy pipeline, with one seed for each image."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

STEPS = 20
GUIDANCE = 3.0
"""Recommended classifier-free guidance of the shipped pipeline."""


def quiet(pipeline: Any) -> Any:
    """The same pipeline without progress bars."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def draw(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    batch_size: int = 64,
) -> list[Image.Image]:
    """One image for each prompt; image i depends only on its own prompt and seed, not on the rest of the batch."""
    images: list[Image.Image] = []
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
        out = pipeline(
            list(prompts[part]), num_inference_steps=steps, guidance_scale=guidance, generator=generators,
            height=32, width=32,
        )  # fmt: skip
        images += out.images
    return images
