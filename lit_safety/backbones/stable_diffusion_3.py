"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206): a transformer trained by rectified flow, up to three text encoders.

    x_t = (1 - sigma) x0 + sigma noise          target = noise - x0
    u = sigmoid(z), z ~ N(0, 1)                 sigma = shift u / (1 + (shift - 1) u)

Timesteps are sigma x 1000, as the denoiser takes them; `shift` is the pipeline's scheduler's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor
from torch.nn.functional import pad

from lit_safety.backbones.backbone import Backbone, Conditioning
from lit_safety.backbones.encoders import encode_posterior, penultimate
from lit_safety.backbones.parts import Parts
from lit_safety.core.errors import UserError

#: Tokens that the stock pipeline gives T5.
T5_LENGTH = 256
#: Tokens of a CLIP encoder, for pipelines that have none.
CLIP_LENGTH = 77


class StableDiffusion3(Backbone):
    """A `StableDiffusion3Pipeline`. Any of its text encoders may be missing: zeros stand for what it would give.

    Timesteps are drawn from the logit-normal distribution of the paper (its mean 0 and deviation 1) and shifted as
    the pipeline's scheduler shifts them; a loss needs no further weight then.

    Raises:
        UserError: if the scheduler shifts by the size of the image, or is none of flow matching.
    """

    PIPELINE = StableDiffusion3Pipeline
    DENOISER = "transformer"
    ENCODERS = (
        "vae",
        "text_encoder",
        "text_encoder_2",
        "text_encoder_3",
        "tokenizer",
        "tokenizer_2",
        "tokenizer_3",
    )
    TOKENIZERS = (("tokenizer", None), ("tokenizer_2", None), ("tokenizer_3", T5_LENGTH))

    def __init__(self, parts: Parts, denoiser: bool = True) -> None:
        super().__init__(parts, denoiser)
        config = self.inference_scheduler.config
        if not hasattr(self.inference_scheduler, "scale_noise") or config.get("use_dynamic_shifting"):
            raise UserError(
                f"{parts.source}: SD3 is trained by flow matching with one shift; its scheduler is "
                f"{type(self.inference_scheduler).__name__}, use_dynamic_shifting {config.get('use_dynamic_shifting')}"
            )
        self.steps = int(config.num_train_timesteps)
        self.shift = float(config.shift)
        vae, transformer = parts.config("vae"), parts.config("transformer")
        self.scaling_factor = float(vae.get("scaling_factor", 1.0))
        self.shift_factor = float(vae.get("shift_factor") or 0.0)
        self.width = int(transformer["joint_attention_dim"])
        self.pooled_width = int(transformer["pooled_projection_dim"])

    # ---- text

    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        found = [self._clip(number, prompts) for number in ("", "_2")]
        if all(one is None for one in found):
            clip = torch.zeros(len(prompts), CLIP_LENGTH, self.width, device=self.device)
            pooled = torch.zeros(len(prompts), self.pooled_width, device=self.device)
        else:
            first, second = self._filled(*found)
            clip, pooled = torch.cat([first[0], second[0]], dim=-1), torch.cat([first[1], second[1]], dim=-1)
        t5 = self._t5(prompts, clip)
        hidden = torch.cat([pad(clip, (0, t5.shape[-1] - clip.shape[-1])), t5], dim=1)
        return {"encoder_hidden_states": hidden, "pooled_projections": pooled}

    def _clip(self, number: str, prompts: Sequence[str]) -> tuple[Tensor, Tensor] | None:
        """Hidden states (B, tokens, width) and pooled (B, P) of a CLIP encoder; None: the pipeline ships without."""
        if not self.parts.has(f"text_encoder{number}"):
            return None
        first = "tokenizer" if self.parts.has("tokenizer") else f"tokenizer{number}"
        length = self.part(first).model_max_length  # the first one's for both, as the stock pipeline has it
        return penultimate(self.part(f"tokenizer{number}"), self.part(f"text_encoder{number}"), prompts, length)

    def _filled(
        self, first: tuple[Tensor, Tensor] | None, second: tuple[Tensor, Tensor] | None
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Zeros in the place of the one that is missing, as wide as the transformer expects.

        SD3's CLIP encoders pool to as many numbers as their hidden states have, so one width tells the other.
        """
        there = first or second
        assert there is not None
        width = self.pooled_width - there[1].shape[-1]
        zeros = there[0].new_zeros(*there[0].shape[:2], width), there[1].new_zeros(len(there[1]), width)
        return first or zeros, second or zeros

    def _t5(self, prompts: Sequence[str], clip: Tensor) -> Tensor:
        """Hidden states (B, 256, width); zeros where there is no T5, as the stock pipeline has it."""
        if not self.parts.has("text_encoder_3"):
            return clip.new_zeros(len(prompts), T5_LENGTH, self.width)
        encoder = self.part("text_encoder_3")
        tokens = self.part("tokenizer_3")(
            list(prompts),
            padding="max_length",
            max_length=T5_LENGTH,
            truncation=True,
            add_special_tokens=True,
            return_tensors="pt",
        )
        return encoder(tokens.input_ids.to(encoder.device, non_blocking=True))[0].to(clip.dtype)

    # ---- images

    def posterior(self, images: Tensor) -> Tensor:
        return encode_posterior(self.part("vae"), images)

    def latents(self, posterior: Tensor, noise: Tensor) -> Tensor:
        return (posterior[:, 0] + posterior[:, 1] * noise - self.shift_factor) * self.scaling_factor

    # ---- the process

    def timesteps(self, uniform: Tensor) -> Tensor:
        """The timestep below which a share ``uniform`` of them lies, float32, from the scheduler's lowest to 1000."""
        u = torch.special.ndtri(uniform.double()).sigmoid().clamp(min=1 / self.steps)
        return (self.shift * u / (1 + (self.shift - 1) * u) * self.steps).float()

    def timestep_fraction(self, timesteps: Tensor) -> Tensor:
        return timesteps / self.steps

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        sigma = (timesteps / self.steps).view(-1, 1, 1, 1).to(latents)
        return sigma * noise + (1 - sigma) * latents

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return noise - latents

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        return self.denoiser(hidden_states=noisy, timestep=timesteps, **conditioning, return_dict=False)[0]

    # ---- out

    def pipeline(self) -> Any:
        """The stock pipeline. It needs both CLIP encoders; where one is missing, text is encoded here."""
        pipe = super().pipeline()
        if not all(self.parts.has(name) for name in ("text_encoder", "text_encoder_2")):
            pipe.encode_prompt = _Encoded(self)
        return pipe


class _Encoded:
    """Stands for `encode_prompt` of a pipeline that ships without a CLIP encoder."""

    def __init__(self, backbone: StableDiffusion3) -> None:
        self.backbone = backbone

    def __call__(
        self, prompt: str | list[str], *args: Any, negative_prompt: str | list[str] | None = None, **options: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        without = negative_prompt or ""
        negatives = [without] * len(prompts) if isinstance(without, str) else list(without)
        count = options.get("num_images_per_prompt", 1)
        with torch.no_grad():
            found = [self.backbone.encode_text(texts) for texts in (prompts, negatives)]
        hidden, negative = (one["encoder_hidden_states"].repeat_interleave(count, 0) for one in found)
        pooled, negative_pooled = (one["pooled_projections"].repeat_interleave(count, 0) for one in found)
        return hidden, negative, pooled, negative_pooled
