"""Stable Diffusion 1.x and 2.x: CLIP text encoder, KL autoencoder, cross-attention UNet, DDPM noise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from peft.utils import get_peft_model_state_dict
from torch import Tensor

from lit_safety.backbones.backbone import Backbone, Conditioning
from lit_safety.errors import UserError


def weights_variant(source: str | Path) -> str | None:
    """`fp16` for a folder that holds its weights only under that name."""
    weights = [file.name for file in Path(source).glob("*/*.safetensors")]
    return "fp16" if weights and all(".fp16." in name for name in weights) else None


class StableDiffusion(Backbone):
    """The parts of a `StableDiffusionPipeline`; epsilon- and v-prediction.

    Raises:
        UserError: if the scheduler's prediction type is neither `epsilon` nor `v_prediction`.
    """

    def __init__(self, pipe: Any) -> None:
        super().__init__()
        self.denoiser = pipe.unet
        self.text_encoder = pipe.text_encoder
        self.vae = pipe.vae
        self.tokenizer = pipe.tokenizer
        self.inference_scheduler = pipe.scheduler
        # The training process is DDPM's whatever sampler the pipeline ships; betas and target come with it.
        self.noise_scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
        self.prediction_type = str(self.noise_scheduler.config.prediction_type)
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise UserError(
                f"scheduler_config.json says prediction_type {self.prediction_type!r}; Stable Diffusion is trained "
                "with 'epsilon' or 'v_prediction'"
            )

    @classmethod
    def from_pretrained(cls, source: str) -> StableDiffusion:
        pipe = StableDiffusionPipeline.from_pretrained(
            source,
            dtype=torch.float32,
            variant=weights_variant(source),
            use_safetensors=True,
            safety_checker=None,
            requires_safety_checker=False,
        )
        # Convolutions run faster on channels-last weights, on GPUs and, by a third of the toy step, on CPUs.
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
        return cls(pipe)

    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        device = self.text_encoder.device
        # As the stock pipeline does: the mask is only used by text encoders that were trained with one.
        masked = getattr(self.text_encoder.config, "use_attention_mask", False)
        mask = tokens.attention_mask.to(device) if masked else None
        hidden = self.text_encoder(tokens.input_ids.to(device), attention_mask=mask)[0]
        return {"encoder_hidden_states": hidden}

    def latent_shape(self, images: Tensor) -> tuple[int, ...]:
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        return (self.vae.config.latent_channels, images.shape[-2] // factor, images.shape[-1] // factor)

    def encode_images(self, images: Tensor, noise: Tensor) -> Tensor:
        posterior = self.vae.encode(images.to(self.vae.dtype)).latent_dist
        # From here to the denoiser everything is fp32: in bf16 the first steps of the schedule would add no noise.
        latents = posterior.mean.float() + posterior.std.float() * noise
        return latents * self.vae.config.scaling_factor

    def timesteps(self, uniform: Tensor) -> Tensor:
        return (uniform * self.noise_scheduler.config.num_train_timesteps).long()

    def timestep_fraction(self, timesteps: Tensor) -> Tensor:
        return timesteps / self.noise_scheduler.config.num_train_timesteps

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return self.noise_scheduler.add_noise(latents, noise, timesteps)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        if self.prediction_type == "v_prediction":
            return self.noise_scheduler.get_velocity(latents, noise, timesteps)
        return noise

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        return self.denoiser(noisy, timesteps, **conditioning, return_dict=False)[0]

    def pipeline(self) -> StableDiffusionPipeline:
        pipe: Any = StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.denoiser,
            scheduler=self.inference_scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def save_lora(self, folder: Path, adapter: str) -> None:
        unet: Any = self.denoiser
        StableDiffusionPipeline.save_lora_weights(
            folder,
            unet_lora_layers=get_peft_model_state_dict(unet, adapter_name=adapter),
            # Without the metadata alpha is lost and the reader assumes alpha = rank.
            unet_lora_adapter_metadata=unet.peft_config[adapter].to_dict(),
        )
