"""Stable Diffusion 1.x and 2.x: CLIP text encoder, KL autoencoder, cross-attention UNet, DDPM noise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from peft.utils import get_peft_model_state_dict
from torch import Tensor

from lit_safety.backbones.autoencoder import encode_posterior
from lit_safety.backbones.backbone import Backbone, Conditioning
from lit_safety.backbones.parts import Parts
from lit_safety.errors import UserError


class StableDiffusion(Backbone):
    """A `StableDiffusionPipeline`; epsilon- and v-prediction.

    Raises:
        UserError: if the scheduler's prediction type is neither `epsilon` nor `v_prediction`.
    """

    ENCODERS = ("vae", "text_encoder", "tokenizer")
    TOKENIZERS = (("tokenizer", None),)

    def __init__(self, parts: Parts, denoiser: bool = True) -> None:
        super().__init__(parts, denoiser)
        self.inference_scheduler = parts.get("scheduler")
        # The training process is DDPM's whatever sampler the pipeline ships; betas and target come with it.
        self.noise_scheduler = DDPMScheduler.from_config(self.inference_scheduler.config)
        self.prediction_type = str(self.noise_scheduler.config.prediction_type)
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise UserError(
                f"scheduler_config.json says prediction_type {self.prediction_type!r}; Stable Diffusion is trained "
                "with 'epsilon' or 'v_prediction'"
            )
        self.scaling_factor = float(parts.config("vae").get("scaling_factor", 0.18215))  # diffusers' default
        # Convolutions run faster on channels-last weights, on GPUs and, by a third of the toy step, on CPUs.
        self.denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # the stubs leave it out

    @property
    def text_encoder(self) -> Any:
        return self.part("text_encoder")

    @property
    def vae(self) -> Any:
        return self.part("vae")

    def part(self, name: str) -> Any:
        fresh = name not in self.parts.loaded
        part = super().part(name)
        if fresh and name == "vae":  # whoever asks first: another memory format rounds otherwise
            part.to(memory_format=torch.channels_last)
        return part

    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        tokenizer = self.part("tokenizer")
        tokens = tokenizer(
            list(prompts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        encoder = self.text_encoder
        # As the stock pipeline does: the mask is only used by text encoders that were trained with one.
        masked = getattr(encoder.config, "use_attention_mask", False)
        mask = tokens.attention_mask.to(encoder.device) if masked else None
        hidden = encoder(tokens.input_ids.to(encoder.device), attention_mask=mask)[0]
        return {"encoder_hidden_states": hidden}

    def posterior(self, images: Tensor) -> Tensor:
        return encode_posterior(self.vae, images)

    def latents(self, posterior: Tensor, noise: Tensor) -> Tensor:
        # From here to the denoiser everything is fp32: in bf16 the first steps of the schedule would add no noise.
        return (posterior[:, 0] + posterior[:, 1] * noise) * self.scaling_factor

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
            tokenizer=self.part("tokenizer"),
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
