"""FLUX.1: a transformer with two-stream blocks and fused single blocks, CLIP's pooled text, T5, embedded guidance.

Only -dev, and models made from it, are trained: -schnell was distilled to draw in a few steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from diffusers import FluxPipeline
from torch import Tensor

from lit_safety.backbones.backbone import Conditioning
from lit_safety.backbones.flow import RectifiedFlow, is_student, pack, unpack
from lit_safety.backbones.parts import Parts
from lit_safety.backbones.settings import GuidedFlowSettings
from lit_safety.core.errors import UserError

#: T5 always gets this many tokens. Neither T5 nor the transformer gets a mask, so padding changes the result.
T5_LENGTH = 512


class Flux(RectifiedFlow):
    """A `FluxPipeline`."""

    PIPELINE = FluxPipeline
    SETTINGS = GuidedFlowSettings
    ENCODERS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    TOKENIZERS = (("tokenizer_2", T5_LENGTH),)  # not CLIP, which gives only a pooled row and cuts most prompts
    ASSISTANT = "ostris/FLUX.1-schnell-training-adapter"
    LORA_TARGETS = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.0.proj", "ff.net.2"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("ff_context.net.0.proj", "ff_context.net.2", "proj_mlp"),
    )

    @classmethod
    def refuse_student(cls, parts: Parts) -> None:
        scheduler = parts.get("scheduler").config
        guided = parts.config("transformer").get("guidance_embeds", False)
        if is_student(parts, "schnell", "turbo") or (not guided and not scheduler.get("use_dynamic_shifting")):
            raise UserError(
                f"{parts.source}: is FLUX.1-schnell or another model distilled to draw in a few steps, which training "
                f"would undo: train its base, black-forest-labs/FLUX.1-dev{cls.instead()}"
            )

    def lora_targets(self) -> list[str]:
        # Whole names, because `proj_out` alone would also match the model's last layer.
        blocks: Any = getattr(self.denoiser, "single_transformer_blocks", ())
        return [*self.LORA_TARGETS, *(f"single_transformer_blocks.{number}.proj_out" for number in range(len(blocks)))]

    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        pooled = self._ids("tokenizer", self.part("tokenizer").model_max_length, prompts)
        rows = self._ids("tokenizer_2", T5_LENGTH, prompts)
        return {
            "pooled_projections": self.part("text_encoder")(pooled).pooler_output,
            "encoder_hidden_states": self.part("text_encoder_2")(rows)[0],
        }

    def _ids(self, tokenizer: str, length: int, prompts: Sequence[str]) -> Tensor:
        """Tokens (B, length)."""
        tokens = self.part(tokenizer)(
            list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        return cast(Tensor, tokens.input_ids.to(self.device, non_blocking=True))

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        rows, _, height, width = noisy.shape
        guidance = None
        if cast(Any, self.denoiser).config.guidance_embeds:
            guidance = noisy.new_full((rows,), cast(GuidedFlowSettings, self.settings).guidance, dtype=torch.float32)
        text = conditioning["encoder_hidden_states"]
        found = self.denoiser(
            hidden_states=pack(noisy),
            timestep=timesteps / 1000,
            guidance=guidance,
            pooled_projections=conditioning["pooled_projections"],
            encoder_hidden_states=text,
            txt_ids=text.new_zeros(text.shape[1], 3),
            img_ids=_token_positions(height // 2, width // 2, noisy),
            return_dict=False,
        )[0]
        return unpack(found, height, width)

    def drawn_latents(self, drawn: Tensor) -> Tensor:
        side = 2 * math.isqrt(drawn.shape[1])
        return unpack(drawn, side, side)

    def given_latents(self, latents: Tensor) -> Tensor:
        return pack(latents)


def _token_positions(height: int, width: int, like: Tensor) -> Tensor:
    """(0, row, column) of each token (height * width, 3)."""
    ids = like.new_zeros(height, width, 3, dtype=torch.float32)
    ids[..., 1] = torch.arange(height, device=like.device)[:, None]
    ids[..., 2] = torch.arange(width, device=like.device)[None]
    return ids.view(-1, 3)
