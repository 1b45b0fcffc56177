"""Z-Image: Qwen3 as text encoder; a transformer that takes lists of texts and images of any length.

Its time has the opposite direction (0 is noise, 1 is the image), and it predicts the negative of the target.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ZImagePipeline
from torch import Tensor

from lit_safety.backbones.backbone import Conditioning
from lit_safety.backbones.flow import RectifiedFlow, is_student
from lit_safety.backbones.parts import Parts
from lit_safety.core.errors import UserError

#: Tokens of a prompt with its template. Short prompts are padded; the padding is masked or left out.
LENGTH = 512


class ZImage(RectifiedFlow):
    """A `ZImagePipeline`."""

    PIPELINE = ZImagePipeline
    ENCODERS = ("vae", "text_encoder", "tokenizer")
    TOKENIZERS = (("tokenizer", None),)
    ASSISTANT = "ostris/zimage_turbo_training_adapter"
    LORA_TARGETS = (
        *("to_q", "to_k", "to_v", "to_out.0"),
        *("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
    )

    @classmethod
    def refuse_student(cls, parts: Parts) -> None:
        if is_student(parts, "turbo"):
            raise UserError(
                f"{parts.source}: was distilled to draw in a few steps, which training would undo: train its base, "
                f"Tongyi-MAI/Z-Image, whose LoRA also fits the distilled one{cls.instead()}"
            )

    # ---- text

    def _texts(self, prompts: Sequence[str]) -> list[str]:
        tokenizer = self.part("tokenizer")
        return [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=True,
            )
            for prompt in prompts
        ]

    def too_long(self, prompts: Sequence[str]) -> list[bool]:
        doubtful = [prompt for prompt in dict.fromkeys(prompts) if len(prompt.encode()) > LENGTH // 8]
        if not doubtful:
            return [False] * len(prompts)
        ids = self.part("tokenizer")(self._texts(doubtful), verbose=False)["input_ids"]
        cut = {prompt for prompt, one in zip(doubtful, ids, strict=True) if len(one) > LENGTH}
        return [prompt in cut for prompt in prompts]

    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        """Rows (B, 512, W), zeros after each text's end, and their mask (B, 512)."""
        tokens = self.part("tokenizer")(
            self._texts(prompts), padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
        ).to(self.device)
        read = tokens.attention_mask.bool()
        hidden = self.part("text_encoder")(
            input_ids=tokens.input_ids, attention_mask=read, output_hidden_states=True
        ).hidden_states[-2]
        rows, mask = torch.zeros_like(hidden), hidden.new_zeros(hidden.shape[:2])
        for number, places in enumerate(read):
            kept = hidden[number][places]
            rows[number, : len(kept)] = kept
            mask[number, : len(kept)] = 1
        return {"encoder_hidden_states": rows, "encoder_hidden_states_mask": mask}

    # ---- the process

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        # Exact lengths matter: the transformer pads texts itself with a token that takes part in attention.
        lengths = (conditioning["encoder_hidden_states_mask"] > 0.5).sum(1).tolist()
        texts = [row[:length] for row, length in zip(conditioning["encoder_hidden_states"], lengths, strict=True)]
        denoiser: Any = self.denoiser
        found = denoiser(list(noisy.unsqueeze(2)), (1000 - timesteps) / 1000, texts, return_dict=False)[0]
        return -torch.stack(list(found)).squeeze(2)
