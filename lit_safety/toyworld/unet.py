"""The toy pipeline's denoiser and noise schedule, and its text encoder beside them for training."""

from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from lit_safety.toyworld.text import WIDTH
from lit_safety.toyworld.vae import LATENT_CHANNELS


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


def new_scheduler() -> Any:
    """DDIMScheduler on Stable Diffusion's noise schedule, v-prediction; few steps start from pure noise (trailing)."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )


class Networks(nn.Module):
    """Denoiser and text encoder, trained as one."""

    def __init__(self, unet: nn.Module, text: nn.Module) -> None:
        super().__init__()
        self.unet, self.text = unet, text

    def loss(self, scheduler: Any, latents: Tensor, ids: Tensor, timesteps: Tensor) -> Tensor:
        """Mean squared error of v (Salimans & Ho, 2022, arXiv:2202.00512, appendix D).

        Args:
            scheduler: gives noisy latents and the velocity.
            latents: (B, 8, 8, 8), unit variance.
            ids: (B, 16) token ids.
            timesteps: (B,).
        """
        noise = torch.randn_like(latents)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        target = scheduler.get_velocity(latents, noise, timesteps)
        hidden = self.text(ids).last_hidden_state
        return nn.functional.mse_loss(self.unet(noisy, timesteps, hidden).sample, target)


def load_networks(work: Path) -> Networks:
    """A new UNet beside the text encoder of the work folder."""
    unet = new_unet().to(memory_format=torch.channels_last)
    return Networks(unet, CLIPTextModel.from_pretrained(work / "text_encoder").train())
