"""Stable Diffusion 1.x and 2.x: one CLIP text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers import StableDiffusionPipeline
from torch import Tensor

from lit_safety.backbones.backbone import Conditioning
from lit_safety.backbones.diffusion import UNetDiffusion


class StableDiffusion(UNetDiffusion):
    """A `StableDiffusionPipeline`; epsilon- and v-prediction."""

    PIPELINE = StableDiffusionPipeline
    ENCODERS = ("vae", "text_encoder", "tokenizer")
    TOKENIZERS = (("tokenizer", None),)

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
        # As in the stock pipeline: only text encoders that were trained with a mask use it.
        masked = getattr(encoder.config, "use_attention_mask", False)
        mask = tokens.attention_mask.to(encoder.device) if masked else None
        hidden = encoder(tokens.input_ids.to(encoder.device, non_blocking=True), attention_mask=mask)[0]
        return {"encoder_hidden_states": hidden}

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        return self.denoiser(noisy, timesteps, **conditioning, return_dict=False)[0]

    def pipeline_options(self) -> dict[str, Any]:
        return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
