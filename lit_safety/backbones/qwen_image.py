"""Qwen-Image: Qwen2.5-VL as text encoder, a video autoencoder used for one frame, text masked in the transformer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import QwenImagePipeline
from torch import Tensor

from lit_safety.backbones.backbone import Conditioning
from lit_safety.backbones.encoders import encode_posterior
from lit_safety.backbones.flow import RectifiedFlow, is_student, longest, pack, unpack
from lit_safety.backbones.parts import Parts
from lit_safety.backbones.settings import BackboneSettings
from lit_safety.core.errors import UserError

#: The template around a prompt.
TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
#: Number of tokens at its beginning whose rows are left out.
DROPPED = 34
#: Largest number of tokens for the text encoder, without those that are dropped.
READ = 1024
#: Rows of a text: longer texts are cut, shorter ones padded and masked.
LENGTH = 512


class QwenImage(RectifiedFlow):
    """A `QwenImagePipeline`. An empty prompt is a space, which its authors use as the empty negative prompt."""

    PIPELINE = QwenImagePipeline
    ENCODERS = ("vae", "text_encoder", "tokenizer")
    TOKENIZERS = (("tokenizer", None),)
    LORA_TARGETS = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
    )

    def __init__(self, parts: Parts, denoiser: bool = True, settings: BackboneSettings | None = None) -> None:
        super().__init__(parts, denoiser, settings)
        if parts.config("transformer").get("guidance_embeds"):
            raise UserError(
                f"{parts.source}: its transformer embeds guidance, which diffusers' class does not compute: train "
                "Qwen/Qwen-Image"
            )
        vae = parts.config("vae")
        self.latents_mean, self.latents_std = (
            torch.tensor(vae[name], dtype=torch.float32).view(-1, 1, 1) for name in ("latents_mean", "latents_std")
        )

    @classmethod
    def refuse_student(cls, parts: Parts) -> None:
        if is_student(parts, "lightning", "turbo"):
            raise UserError(
                f"{parts.source}: was distilled to draw in a few steps, which training would undo: train its base, "
                "Qwen/Qwen-Image"
            )

    def _pixels_a_latent(self, vae: dict[str, Any]) -> int:
        return 2 ** len(vae.get("temperal_downsample", (0,) * 3))

    # ---- text

    def too_long(self, prompts: Sequence[str]) -> list[bool]:
        doubtful = [prompt for prompt in dict.fromkeys(prompts) if len(prompt.encode()) > LENGTH // 8]
        if not doubtful:
            return [False] * len(prompts)
        ids = self.part("tokenizer")([TEMPLATE.format(prompt) for prompt in doubtful], verbose=False)["input_ids"]
        cut = {prompt for prompt, one in zip(doubtful, ids, strict=True) if len(one) - DROPPED > LENGTH}
        return [prompt in cut for prompt in prompts]

    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        """Rows (B, 512, W), zeros after each text's end, and their mask (B, 512)."""
        tokens = self.part("tokenizer")(
            [TEMPLATE.format(prompt or " ") for prompt in prompts],
            max_length=READ + DROPPED,
            padding=True,
            truncation=True,
            return_tensors="pt",
        ).to(self.device)
        hidden = self.part("text_encoder")(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, output_hidden_states=True
        ).hidden_states[-1]
        rows = hidden.new_zeros(len(prompts), LENGTH, hidden.shape[-1])
        mask = hidden.new_zeros(len(prompts), LENGTH)
        for number, read in enumerate(tokens.attention_mask.bool()):  # independent of the tokenizer's padding side
            kept = hidden[number][read][DROPPED : DROPPED + LENGTH]
            rows[number, : len(kept)] = kept
            mask[number, : len(kept)] = 1
        return {"encoder_hidden_states": rows, "encoder_hidden_states_mask": mask}

    # ---- images

    def posterior(self, images: Tensor) -> Tensor:
        self.check_size(images)
        return encode_posterior(self.part("vae"), images.unsqueeze(2)).squeeze(3)

    def latents(self, posterior: Tensor, noise: Tensor) -> Tensor:
        drawn = posterior[:, 0] + posterior[:, 1] * noise
        return (drawn - self.latents_mean.to(drawn)) / self.latents_std.to(drawn)

    # ---- the process

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        rows, _, height, width = noisy.shape
        mask = conditioning["encoder_hidden_states_mask"]
        length = longest(mask)
        read = mask[:, :length] > 0.5
        found = self.denoiser(
            hidden_states=pack(noisy),
            timestep=timesteps / 1000,
            encoder_hidden_states=conditioning["encoder_hidden_states"][:, :length],
            encoder_hidden_states_mask=None if bool(read.all()) else read.to(torch.int64),
            img_shapes=[[(1, height // 2, width // 2)]] * rows,
            return_dict=False,
        )[0]
        return unpack(found, height, width)

    def drawn_latents(self, drawn: Tensor) -> Tensor:
        side = 2 * math.isqrt(drawn.shape[1])
        return unpack(drawn, side, side)

    def given_latents(self, latents: Tensor) -> Tensor:
        return pack(latents)
