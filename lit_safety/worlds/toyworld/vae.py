"""The toy pipeline's AutoencoderKL: (B, 3, 32, 32) images to (B, 8, 8, 8) latents."""

from typing import Any

from diffusers import AutoencoderKL

LATENT_CHANNELS = 8


def new_vae() -> Any:
    """An untrained AutoencoderKL of about 0.7 M parameters."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=32,
    )
