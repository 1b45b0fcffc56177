"""SDXL (arXiv 2307.01952): two text encoders, a pooled embedding, and the sizes and the crop of each image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from lit_safety.backbones.backbone import Conditioning
from lit_safety.backbones.diffusion import UNetDiffusion
from lit_safety.backbones.encoders import penultimate
from lit_safety.backbones.parts import Parts
from lit_safety.backbones.pipeline_index import pipeline_index
from lit_safety.backbones.settings import BackboneSettings
from lit_safety.core.errors import UserError

#: The setting in the pipeline's index for an empty prompt; diffusers' default is true.
ZEROS = "force_zeros_for_empty_prompt"


class StableDiffusionXL(UNetDiffusion):
    """A `StableDiffusionXLPipeline`.

    An empty prompt gives what the pipeline uses without a negative prompt: zeros, unless its index says otherwise. So
    dropped prompts are trained with the same numbers that guidance uses.

    Raises:
        UserError: its UNet does not take sizes and a pooled embedding.
    """

    PIPELINE = StableDiffusionXLPipeline
    ENCODERS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    TOKENIZERS = (("tokenizer", None), ("tokenizer_2", None))

    def __init__(self, parts: Parts, denoiser: bool = True, settings: BackboneSettings | None = None) -> None:
        super().__init__(parts, denoiser, settings)
        kind = parts.config("unet").get("addition_embed_type")
        if kind != "text_time":
            raise UserError(f"{parts.source}: an SDXL's UNet takes text and sizes, but this one's config says {kind!r}")
        self.zero_empty = _zeros(parts.index.settings)
        self.pixels_a_latent = 2 ** (len(parts.config("vae").get("block_out_channels", (0,) * 4)) - 1)

    @classmethod
    def encoder_hashes(cls, source: str) -> dict[str, str]:
        found = super().encoder_hashes(source)
        return found | {"empty prompt": "zeros" if _zeros(pipeline_index(source).settings) else "encoded"}

    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        first, _ = penultimate(self.part("tokenizer"), self.part("text_encoder"), prompts)
        second, pooled = penultimate(self.part("tokenizer_2"), self.part("text_encoder_2"), prompts)
        if first.shape[1] != second.shape[1]:
            raise UserError(
                f"{self.parts.source}: `model_max_length` of tokenizer is {first.shape[1]} and of tokenizer_2 "
                f"{second.shape[1]}, and SDXL reads as many tokens by each; copy their tokenizer_config.json again"
            )
        hidden = torch.cat([first, second], dim=-1)
        if self.zero_empty:
            stated = torch.tensor([prompt != "" for prompt in prompts]).to(hidden.device, non_blocking=True)
            hidden = torch.where(stated[:, None, None], hidden, torch.zeros_like(hidden))
            pooled = torch.where(stated[:, None], pooled, torch.zeros_like(pooled))
        return {"encoder_hidden_states": hidden, "text_embeds": pooled}

    def crop_conditioning(self, crops: Tensor) -> Conditioning:
        # In the order of the pipeline: original size, top left of the crop, target size.
        return {"time_ids": crops}

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The UNet's prediction; without `time_ids` for an image without crop, as in inference."""
        rest = dict(conditioning)
        added = {"text_embeds": rest.pop("text_embeds"), "time_ids": rest.pop("time_ids", None)}
        if added["time_ids"] is None:
            added["time_ids"] = self._whole_image(noisy)
        return self.denoiser(noisy, timesteps, **rest, added_cond_kwargs=added, return_dict=False)[0]

    def _whole_image(self, noisy: Tensor) -> Tensor:
        """Time ids (B, 6) of images without crop: height, width, 0, 0, height, width.

        They are filled in on the device, because a copy from the host would wait for all earlier work of the device.
        """
        ids = noisy.new_zeros(len(noisy), 6)
        for column, side in enumerate(noisy.shape[-2:]):
            ids[:, column::4] = side * self.pixels_a_latent
        return ids

    def pipeline_options(self) -> dict[str, Any]:
        return {ZEROS: self.zero_empty}


def _zeros(settings: dict[str, Any]) -> bool:
    return bool(settings.get(ZEROS, True))
