"""FLUX.2: -dev (Mistral as text encoder, embedded guidance) and -klein-base (Qwen3, guidance by two passes).

Latents are 2 x 2 patches as channels (B, 4 C, h/2, w/2). Each channel is normalised by statistics from the image
encoder's weights. So a posterior is already normalised, and using a cache of it needs no weights.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from torch import Tensor

from lit_safety.backbones.backbone import Conditioning
from lit_safety.backbones.encoders import encode_posterior
from lit_safety.backbones.flow import RectifiedFlow, is_student
from lit_safety.backbones.parts import Parts
from lit_safety.backbones.settings import GuidedFlowSettings
from lit_safety.core.errors import UserError

#: A prompt with its template always has this many tokens. The transformer has no mask, so padding changes the result.
LENGTH = 512
#: The number of inference steps for which the shift is computed; in these pipelines the shift depends on it.
STEPS = 50


class _Flux2(RectifiedFlow):
    """The common base of both models."""

    ENCODERS = ("vae", "text_encoder", "tokenizer")
    TOKENIZERS = (("tokenizer", None),)
    PATCH = 1  # the image encoder's output already consists of patches
    #: The language model's hidden states that are concatenated in a token's row.
    LAYERS: ClassVar[tuple[int, int, int]]
    LORA_TARGETS = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.linear_in", "ff.linear_out"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("ff_context.linear_in", "ff_context.linear_out", "attn.to_qkv_mlp_proj"),
    )

    def _pixels_a_latent(self, vae: dict[str, Any]) -> int:
        return 2 * super()._pixels_a_latent(vae)

    def lora_targets(self) -> list[str]:
        # Whole names, because `attn.to_out` is a list of layers in the two-stream blocks.
        blocks: Any = getattr(self.denoiser, "single_transformer_blocks", ())
        return [
            *self.LORA_TARGETS,
            *(f"single_transformer_blocks.{number}.attn.to_out" for number in range(len(blocks))),
        ]

    # ---- text

    @abstractmethod
    def tokens_of(self, prompts: Sequence[str], truncation: bool) -> Any:
        """The tokenizer's output for prompts in the family's template."""

    def too_long(self, prompts: Sequence[str]) -> list[bool]:
        # A token is at least a byte, so only long prompts need the tokenizer here.
        doubtful = [prompt for prompt in dict.fromkeys(prompts) if len(prompt.encode()) > LENGTH // 8]
        if not doubtful:
            return [False] * len(prompts)
        ids = self.tokens_of(doubtful, truncation=False)["input_ids"]
        cut = {prompt for prompt, one in zip(doubtful, ids, strict=True) if len(one) > LENGTH}
        return [prompt in cut for prompt in prompts]

    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        tokens = self.tokens_of(prompts, truncation=True)
        found = self.part("text_encoder")(
            input_ids=tokens["input_ids"].to(self.device),
            attention_mask=tokens["attention_mask"].to(self.device),
            output_hidden_states=True,
            use_cache=False,
        )
        return {"encoder_hidden_states": torch.cat([found.hidden_states[layer] for layer in self.LAYERS], dim=-1)}

    # ---- images

    def posterior(self, images: Tensor) -> Tensor:
        self.check_size(images)
        found = encode_posterior(self.part("vae"), images)
        rows = len(found)
        patches = _patches(found.flatten(0, 1)).unflatten(0, (rows, 2))
        mean, std = self._statistics()
        return torch.stack([(patches[:, 0] - mean) / std, patches[:, 1] / std], dim=1)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of each channel (4 C, 1, 1)."""
        vae = self.part("vae")
        deviation = torch.sqrt(vae.bn.running_var.float() + vae.config.batch_norm_eps)
        return vae.bn.running_mean.float().view(-1, 1, 1), deviation.view(-1, 1, 1)

    def latents(self, posterior: Tensor, noise: Tensor) -> Tensor:
        return posterior[:, 0] + posterior[:, 1] * noise

    # ---- the process

    def mu(self, tokens: int) -> float:
        """mu as in these pipelines: it depends on the number of tokens and, below 4300 tokens, also on the steps.

        The scheduler's own settings are not used.
        """
        at_200 = 0.00016927 * tokens + 0.45666666
        if tokens > 4300:
            return at_200
        at_10 = 8.73809524e-05 * tokens + 1.89833333
        slope = (at_200 - at_10) / 190.0
        return slope * STEPS + at_200 - 200.0 * slope

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        rows, channels, height, width = noisy.shape
        guidance = None
        if cast(Any, self.denoiser).config.guidance_embeds:
            guidance = noisy.new_full((rows,), cast(GuidedFlowSettings, self.settings).guidance, dtype=torch.float32)
        text = conditioning["encoder_hidden_states"]
        places = torch.zeros(rows, text.shape[1], 4, dtype=torch.int64, device=noisy.device)
        places[:, :, 3] = torch.arange(text.shape[1], device=noisy.device)
        squares = torch.zeros(rows, height, width, 4, dtype=torch.int64, device=noisy.device)
        squares[..., 1] = torch.arange(height, device=noisy.device)[:, None]
        squares[..., 2] = torch.arange(width, device=noisy.device)[None]
        found: Tensor = self.denoiser(
            hidden_states=noisy.flatten(2).transpose(1, 2),
            timestep=timesteps / 1000,
            guidance=guidance,
            encoder_hidden_states=text,
            txt_ids=places,
            img_ids=squares.flatten(1, 2),
            return_dict=False,
        )[0]
        return found.transpose(1, 2).reshape(rows, channels, height, width)


def _patches(latents: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, 4 C, h/2, w/2); the channel index changes slowest."""
    rows, channels, height, width = latents.shape
    blocks = latents.reshape(rows, channels, height // 2, 2, width // 2, 2).permute(0, 1, 3, 5, 2, 4)
    return blocks.reshape(rows, channels * 4, height // 2, width // 2)


class Flux2Klein(_Flux2):
    """A `Flux2KleinPipeline`: the base model, not the distilled one."""

    PIPELINE = Flux2KleinPipeline
    LAYERS = (9, 18, 27)

    @classmethod
    def refuse_student(cls, parts: Parts) -> None:
        if parts.index.settings.get("is_distilled") or is_student(parts, "distilled"):
            raise UserError(
                f"{parts.source}: was distilled to draw in a few steps, which training would undo: train its base, "
                "black-forest-labs/FLUX.2-klein-base-4B or -9B; the LoRA also fits the distilled one"
            )

    def pipeline_options(self) -> dict[str, Any]:
        return {"is_distilled": False}

    def drawn_latents(self, drawn: Tensor) -> Tensor:
        mean, std = self._statistics()  # the stock pipeline has undone the normalisation
        return (_patches(drawn) - mean) / std

    def tokens_of(self, prompts: Sequence[str], truncation: bool) -> Any:
        tokenizer = self.part("tokenizer")
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=False,
            )
            for prompt in prompts
        ]
        if not truncation:
            return tokenizer(texts, verbose=False)
        return tokenizer(texts, return_tensors="pt", padding="max_length", truncation=True, max_length=LENGTH)


class Flux2(_Flux2):
    """A `Flux2Pipeline` (FLUX.2-dev). Its tokenizer may be a processor of texts and images."""

    PIPELINE = Flux2Pipeline
    SETTINGS = GuidedFlowSettings
    LAYERS = (10, 20, 30)

    @classmethod
    def refuse_student(cls, parts: Parts) -> None:
        if is_student(parts, "turbo"):
            raise UserError(
                f"{parts.source}: was distilled to draw in a few steps, which training would undo: train its base, "
                "black-forest-labs/FLUX.2-dev"
            )

    def drawn_latents(self, drawn: Tensor) -> Tensor:
        side = math.isqrt(drawn.shape[1])
        return drawn.transpose(1, 2).unflatten(2, (side, side))

    def tokens_of(self, prompts: Sequence[str], truncation: bool) -> Any:
        from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE

        talks = [
            [
                {"role": "system", "content": [{"type": "text", "text": SYSTEM_MESSAGE}]},
                {"role": "user", "content": [{"type": "text", "text": prompt.replace("[IMG]", "")}]},
            ]
            for prompt in prompts
        ]
        tokenizer = self.part("tokenizer")
        how: dict[str, Any] = {"add_generation_prompt": False, "tokenize": True, "return_dict": True}
        if truncation:
            how |= {"return_tensors": "pt", "padding": "max_length", "truncation": True, "max_length": LENGTH}
        return tokenizer.apply_chat_template(talks, **how)
