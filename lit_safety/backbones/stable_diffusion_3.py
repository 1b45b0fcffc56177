"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206): a transformer trained by rectified flow, up to three text encoders.

Its defaults agree with the paper, with diffusers' training script and with inference: logit-normal timesteps with mean
0 and standard deviation 1, and the scheduler's shift.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from lit_safety.backbones.backbone import Conditioning
from lit_safety.backbones.encoders import penultimate
from lit_safety.backbones.flow import RectifiedFlow, is_student
from lit_safety.backbones.parts import Parts
from lit_safety.backbones.settings import BackboneSettings
from lit_safety.core.errors import UserError

#: Number of T5 tokens in the stock pipeline.
T5_LENGTH = 256
#: Number of tokens of a CLIP encoder, for pipelines without one.
CLIP_LENGTH = 77
#: Two rows replace the 256 rows of zeros of a missing T5; these numbers are added to the logits of their keys. The 256
#: rows are equal in every layer, so attention counts e^5.5 + e^2.42 = 256 of them. A single row with 5.545 would have
#: an error of 1.4% in bfloat16.
STAND_INS = (5.5, math.log(T5_LENGTH - math.exp(5.5)))


class StableDiffusion3(RectifiedFlow):
    """A `StableDiffusion3Pipeline`. Any of its text encoders may be missing: zeros replace its output.

    Raises:
        UserError: the scheduler is not for flow matching, or the model was distilled to draw in a few steps.
    """

    PIPELINE = StableDiffusion3Pipeline
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
    LORA_TARGETS = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )

    def __init__(self, parts: Parts, denoiser: bool = True, settings: BackboneSettings | None = None) -> None:
        super().__init__(parts, denoiser, settings)
        transformer = parts.config("transformer")
        self.width = int(transformer["joint_attention_dim"])
        self.pooled_width = int(transformer["pooled_projection_dim"])
        self.has_t5 = parts.has("text_encoder_3")
        if denoiser and not self.has_t5:
            for block in self.denoiser.transformer_blocks:  # type: ignore[union-attr]  # modules of diffusers
                block.attn.set_processor(BiasedJointAttention())

    @classmethod
    def refuse_student(cls, parts: Parts) -> None:
        if is_student(parts, "turbo", "flash"):
            raise UserError(
                f"{parts.source}: was distilled to draw in a few steps, which training would undo: train its base, "
                "stabilityai/stable-diffusion-3.5-large or -medium"
            )

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
        """Hidden states (B, tokens, width) and pooled (B, P) of a CLIP encoder; None: the pipeline does not contain
        it."""
        if not self.parts.has(f"text_encoder{number}"):
            return None
        first = "tokenizer" if self.parts.has("tokenizer") else f"tokenizer{number}"
        length = self.part(first).model_max_length  # the first one's length for both, as in the stock pipeline
        return penultimate(self.part(f"tokenizer{number}"), self.part(f"text_encoder{number}"), prompts, length)

    def _filled(
        self, first: tuple[Tensor, Tensor] | None, second: tuple[Tensor, Tensor] | None
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Zeros in place of a missing encoder's output, as wide as the transformer expects.

        In SD3's CLIP encoders the pooled output has the width of the hidden states, so one width gives the other.
        """
        there = first or second
        assert there is not None
        width = self.pooled_width - there[1].shape[-1]
        zeros = there[0].new_zeros(*there[0].shape[:2], width), there[1].new_zeros(len(there[1]), width)
        return first or zeros, second or zeros

    def _t5(self, prompts: Sequence[str], clip: Tensor) -> Tensor:
        """Hidden states (B, 256, width); without T5 two rows of zeros, which `predict` counts as 256."""
        if not self.has_t5:
            return clip.new_zeros(len(prompts), len(STAND_INS), self.width)
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

    # ---- the process

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        given = {**conditioning, "return_dict": False}
        rows = conditioning["encoder_hidden_states"].shape[1]
        if not self.has_t5 and rows < T5_LENGTH:  # caches of versions before 0.3 hold all 256 rows
            keys = rows + self.tokens(*noisy.shape[-2:])
            bias = pad(noisy.new_tensor(STAND_INS), (keys - len(STAND_INS), 0))
            given["joint_attention_kwargs"] = {"attention_mask": bias}
        return self.denoiser(hidden_states=noisy, timestep=timesteps, **given)[0]

    # ---- out

    def pipeline(self) -> Any:
        """The stock pipeline. It needs both CLIP encoders; if one is missing, text is encoded here."""
        pipe = super().pipeline()
        count_missing_t5(pipe)
        if not all(self.parts.has(name) for name in ("text_encoder", "text_encoder_2")):
            pipe.encode_prompt = _Encoded(self)
        return pipe


def count_missing_t5(pipe: Any) -> None:
    """Makes a stock pipeline without T5 draw the same with two rows instead of the 256 rows of zeros."""
    if pipe.text_encoder_3 is not None:
        return
    for block in pipe.transformer.transformer_blocks:
        block.attn.set_processor(BiasedJointAttention())
    stock = pipe._get_t5_prompt_embeds
    pipe._get_t5_prompt_embeds = lambda **named: stock(**{**named, "max_sequence_length": len(STAND_INS)})


class _Encoded:
    """Replaces `encode_prompt` of a pipeline without a CLIP encoder."""

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
        # In the stock pipeline every row counts once.
        missing = 0 if self.backbone.has_t5 else T5_LENGTH - len(STAND_INS)
        rows = [pad(one["encoder_hidden_states"], (0, 0, 0, missing)) for one in found]
        hidden, negative = (one.repeat_interleave(count, 0) for one in rows)
        pooled, negative_pooled = (one["pooled_projections"].repeat_interleave(count, 0) for one in found)
        return hidden, negative, pooled, negative_pooled


class BiasedJointAttention:
    """SD3's joint attention with a bias on the keys' logits; without a bias the results are those of diffusers."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Image tokens (B, N, W), text tokens (B, L, W), bias (N + L,) -> new image and text tokens."""

        def heads(of: Any, tokens: Tensor, norm: Any = None) -> Tensor:
            split = of(tokens).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            return split if norm is None else norm(split)

        query = torch.cat([heads(attn.to_q, hidden_states, attn.norm_q),
                           heads(attn.add_q_proj, encoder_hidden_states, attn.norm_added_q)], dim=2)  # fmt: skip
        key = torch.cat([heads(attn.to_k, hidden_states, attn.norm_k),
                         heads(attn.add_k_proj, encoder_hidden_states, attn.norm_added_k)], dim=2)  # fmt: skip
        value = torch.cat([heads(attn.to_v, hidden_states), heads(attn.add_v_proj, encoder_hidden_states)], dim=2)
        if attention_mask is None and encoder_hidden_states.shape[1] < T5_LENGTH:  # as a pipeline calls it
            attention_mask = pad(query.new_tensor(STAND_INS), (key.shape[2] - len(STAND_INS), 0))
        bias = None if attention_mask is None else attention_mask.to(query.dtype).view(1, 1, 1, -1)
        mixed = scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2).flatten(2)
        mixed = mixed.to(query.dtype)
        image, text = mixed.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1)
        if not attn.context_pre_only:
            text = attn.to_add_out(text)
        return attn.to_out[1](attn.to_out[0](image)), text
