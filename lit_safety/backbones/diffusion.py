"""What Stable Diffusion 1.x, 2.x and XL share: a UNet, a KL autoencoder and DDPM noise."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from lit_safety.backbones.backbone import Backbone
from lit_safety.backbones.encoders import encode_posterior
from lit_safety.backbones.parts import Parts
from lit_safety.backbones.settings import BackboneSettings
from lit_safety.core.errors import UserError


class UNetDiffusion(Backbone):
    """Epsilon- and v-prediction at discrete timesteps.

    Raises:
        UserError: the scheduler's prediction type is neither `epsilon` nor `v_prediction`, or its process is not
            DDPM's.
    """

    def __init__(self, parts: Parts, denoiser: bool = True, settings: BackboneSettings | None = None) -> None:
        super().__init__(parts, denoiser, settings)
        config = self.inference_scheduler.config
        if "sigma_data" in config:
            raise UserError(
                f"{parts.source}: its scheduler is {type(self.inference_scheduler).__name__}, of the EDM process, "
                "which this backbone does not train"
            )
        # The training process is DDPM's, whatever sampler the pipeline contains; betas and target come from the
        # sampler.
        self.noise_scheduler = DDPMScheduler.from_config(config)
        self.prediction_type = str(self.noise_scheduler.config.prediction_type)
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise UserError(
                f"scheduler_config.json says prediction_type {self.prediction_type!r}; Stable Diffusion is trained "
                "with 'epsilon' or 'v_prediction'"
            )
        config = parts.config("vae")
        self.scaling_factor = float(config.get("scaling_factor", 0.18215))  # diffusers' default
        self.latents_mean = _by_channel(config.get("latents_mean"))
        self.latents_std = _by_channel(config.get("latents_std"))
        # Convolutions run faster on channels-last weights, on GPUs and on CPUs (there by a third of the toy world's
        # step).
        self.denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # the stubs leave it out

    @property
    def text_encoder(self) -> Any:
        return self.part("text_encoder")

    @property
    def vae(self) -> Any:
        return self.part("vae")

    def posterior(self, images: Tensor) -> Tensor:
        return encode_posterior(self.vae, images)

    def latents(self, posterior: Tensor, noise: Tensor) -> Tensor:
        # From here to the denoiser everything is fp32: in bf16 the first steps of the schedule would add no noise.
        drawn = posterior[:, 0] + posterior[:, 1] * noise
        if self.latents_mean is None or self.latents_std is None:
            return drawn * self.scaling_factor
        return (drawn - self.latents_mean.to(drawn)) * (self.scaling_factor / self.latents_std.to(drawn))

    def timesteps(self, uniform: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        return (uniform * self.noise_scheduler.config.num_train_timesteps).long()

    def timestep_fraction(self, timesteps: Tensor) -> Tensor:
        return timesteps / self.noise_scheduler.config.num_train_timesteps

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return self.noise_scheduler.add_noise(latents, noise, timesteps)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        if self.prediction_type == "v_prediction":
            return self.noise_scheduler.get_velocity(latents, noise, timesteps)
        return noise


def _by_channel(values: Any) -> Tensor | None:
    """A config's numbers as a tensor (C, 1, 1)."""
    return None if values is None else torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)
