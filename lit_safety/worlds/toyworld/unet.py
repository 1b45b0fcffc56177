"""The base's data: tens of thousands of drawn scenes with captions, made once and kept in the work folder."""

from pathlib import Path
from typing import Any

import numpy as np
from diffusers import UNet2DConditionModel
from numpy.typing import NDArray

from lit_safety.core.processes import each
from lit_safety.worlds.toyworld.captions import draw_caption
from lit_safety.worlds.toyworld.sampling import draw_scene, grade
from lit_safety.worlds.toyworld.scene import SIDE, render, to_array
from lit_safety.worlds.toyworld.seeds import stream
from lit_safety.worlds.toyworld.text import WIDTH
from lit_safety.worlds.toyworld.vae import LATENT_CHANNELS

CAPTIONS_EACH = 4
"""Number of captions of one scene: the same things in different templates and phrases."""
GRADED = 0.12
"""Share of harms that are smaller, partly hidden or doubled."""


def base_scene(index: int) -> tuple[NDArray[np.uint8], list[str]]:
    """Image (SIDE, SIDE, 3) and captions of the base's scene number `index`."""
    rng = stream("base", index)
    scene, contents = draw_scene(rng)
    if rng.random() < GRADED:
        scene = grade(rng, scene)
    captions = [draw_caption(rng, scene.setting, contents) for _ in range(CAPTIONS_EACH)]
    return to_array(render(scene)), captions


def _chunk(bounds: tuple[int, int]) -> tuple[NDArray[np.uint8], list[list[str]]]:
    made = [base_scene(i) for i in range(*bounds)]
    return np.stack([image for image, _ in made]), [captions for _, captions in made]


def draw_base_scenes(count: int, workers: int = 2) -> tuple[NDArray[np.uint8], list[list[str]]]:
    """The first `count` scenes of the base: images (count, SIDE, SIDE, 3) and captions."""
    bounds = [(start, min(start + 500, count)) for start in range(0, count, 500)]
    images = np.empty((count, SIDE, SIDE, 3), np.uint8)
    captions: list[list[str]] = []
    for (start, stop), (drawn, said) in zip(bounds, each(_chunk, bounds, workers), strict=True):
        images[start:stop] = drawn
        captions += said
    return images, captions


def make_scenes(work: Path, count: int, workers: int = 2) -> None:
    """Writes scenes.npz into the work folder: `pictures` (N, SIDE, SIDE, 3) uint8, `captions` (N, 4) text."""
    images, captions = draw_base_scenes(count, workers)
    part = work / "scenes.part.npz"
    np.savez(part, pictures=images, captions=np.array(captions))
    part.rename(work / "scenes.npz")


# The toy pipeline's denoiser and noise schedule.


def new_unet() -> Any:
    """An untrained UNet2DConditionModel of 4.8 M parameters: convolutions at 8x8, attention at 4x4."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(96, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )
