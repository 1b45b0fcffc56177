"""SANA: Gemma 2 with a fixed instruction as text encoder, and a 32 x autoencoder without a standard deviation."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from diffusers import SanaPipeline
from torch import Tensor

from lit_safety.backbones.backbone import Conditioning
from lit_safety.backbones.flow import RectifiedFlow, is_student
from lit_safety.backbones.parts import Parts
from lit_safety.core.errors import UserError

#: Rows of a text: that of the first token and the last 299, after padding on the right.
LENGTH = 300


class Sana(RectifiedFlow):
    """A `SanaPipeline`. An empty prompt has no instruction in front of it, as in the pipeline.

    diffusers' training script makes a flow-matching scheduler from the pipeline's scheduler, which has no `shift`. So
    it trains without a shift (`shift: script`), although inference shifts by `flow_shift`.
    """

    PIPELINE = SanaPipeline
    ENCODERS = ("vae", "text_encoder", "tokenizer")
    TOKENIZERS = (("tokenizer", None),)
    LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
    PATCH = 1

    @classmethod
    def refuse_student(cls, parts: Parts) -> None:
        if is_student(parts, "sprint"):
            raise UserError(
                f"{parts.source}: was distilled to draw in a few steps, which training would undo: train its base, "
                "Efficient-Large-Model/Sana_1600M_1024px_diffusers"
            )

    def _pixels_a_latent(self, vae: dict[str, Any]) -> int:
        return 2 ** (len(vae.get("encoder_block_out_channels", (0,) * 6)) - 1)

    # ---- text

    def too_long(self, prompts: Sequence[str]) -> list[bool]:
        doubtful = [prompt for prompt in dict.fromkeys(prompts) if len(prompt.encode()) > LENGTH // 2]
        if not doubtful:
            return [False] * len(prompts)
        ids = self.part("tokenizer")([one.lower().strip() for one in doubtful], verbose=False)["input_ids"]
        cut = {prompt for prompt, one in zip(doubtful, ids, strict=True) if len(one) > LENGTH - 1}
        return [prompt in cut for prompt in prompts]

    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        """Rows (B, 300, W) and their mask (B, 300)."""
        asked = [prompt != "" for prompt in prompts]
        found = {}
        for kind in sorted(set(asked)):
            own = [prompt for prompt, yes in zip(prompts, asked, strict=True) if yes is kind]
            found[kind] = iter(zip(*self._rows(own, kind), strict=True))
        rows = [next(found[kind]) for kind in asked]
        return {
            "encoder_hidden_states": torch.stack([hidden for hidden, _ in rows]),
            "encoder_attention_mask": torch.stack([mask for _, mask in rows]),
        }

    def _rows(self, prompts: Sequence[str], instructed: bool) -> tuple[Tensor, Tensor]:
        """Rows and mask of prompts, either all with the instruction or all without."""
        tokenizer = self.part("tokenizer")
        tokenizer.padding_side = "right"
        texts, length = [prompt.lower().strip() for prompt in prompts], LENGTH
        if instructed:
            texts = [_instruction() + text for text in texts]
            length += len(tokenizer.encode(_instruction())) - 2
        tokens = tokenizer(
            texts,
            padding="max_length",
            max_length=length,
            truncation=True,
            add_special_tokens=True,
            return_tensors="pt",
        ).to(self.device)
        hidden = self.part("text_encoder")(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        kept = [0, *range(length - LENGTH + 1, length)]
        return hidden[:, kept], tokens.attention_mask[:, kept].to(hidden.dtype)

    # ---- images

    def posterior(self, images: Tensor) -> Tensor:
        self.check_size(images)
        vae = self.part("vae")
        with torch.autocast(images.device.type, enabled=False):  # its authors warn against half precision
            mean = vae.encode(images.to(vae.dtype)).latent.float().contiguous()
        return torch.stack([mean, torch.zeros_like(mean)], dim=1)

    # ---- the process

    def script_shift(self) -> float:
        return 1.0

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        denoiser: Any = self.denoiser
        found: Tensor = denoiser(
            noisy,
            encoder_hidden_states=conditioning["encoder_hidden_states"],
            encoder_attention_mask=conditioning["encoder_attention_mask"],
            timestep=timesteps * denoiser.config.timestep_scale,
            return_dict=False,
        )[0]
        channels = noisy.shape[1]
        return found[:, :channels] if found.shape[1] == 2 * channels else found


@cache
def _instruction() -> str:
    """The pipeline's instruction, which is a default value in its call's signature."""
    lines = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    return "\n".join(lines)
