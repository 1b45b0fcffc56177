"""Tiny random UNets of the two families, and user adapters that are not the identity."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_safety.adapters.user_attention import UserAdapter

CONTEXT, EMBEDDING = 32, 12
FAMILIES: dict[str, dict[str, Any]] = {
    "sd": {
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 2,
    },
    "sdxl": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": [1, 1, 2],
        "attention_head_dim": [2, 2, 4],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + CONTEXT,
    },
}


def _unet(family: str = "sd", seed: int = 0, context: int = CONTEXT) -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(8, 16, 24), norm_num_groups=4,
        cross_attention_dim=context, **FAMILIES[family],
    )  # fmt: skip
    return unet.requires_grad_(False).eval()


@pytest.fixture
def make_unet() -> Callable[..., Any]:
    """`make_unet(family="sd", seed=0, context=32)`; layers of widths 8, 16 and 24, so that a mix-up shows."""
    return _unet


@pytest.fixture
def call_unet() -> Callable[..., torch.Tensor]:
    """`call_unet(unet, tokens=None, rows=2)`: the prediction for fixed noise and text."""

    def call(unet: Any, tokens: torch.Tensor | None = None, rows: int = 2) -> torch.Tensor:
        generator = torch.Generator().manual_seed(5)
        noisy = torch.randn(rows, 4, 8, 8, generator=generator)
        text = torch.randn(rows, 5, unet.config.cross_attention_dim, generator=generator)
        pooled = torch.randn(rows, CONTEXT, generator=generator)
        extra: dict[str, Any] = {}
        if unet.config.addition_embed_type == "text_time":
            extra = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": torch.ones(rows, 6)}}
        if tokens is not None:
            extra |= {"cross_attention_kwargs": {"user_tokens": tokens}}
        timesteps = torch.arange(rows) * 300 + 100
        return unet(noisy, timesteps, text, return_dict=False, **extra)[0]

    return call


def _randomise(adapter: UserAdapter, seed: int = 1) -> UserAdapter:
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in adapter.named_parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    size = adapter.projection.embedding_dim
    adapter.projection.mean.copy_(torch.randn(size, generator=generator))
    adapter.projection.std.copy_(torch.rand(size, generator=generator) + 0.5)
    return adapter


@pytest.fixture
def make_adapter() -> Callable[..., UserAdapter]:
    """`make_adapter(unet, tokens=4, embedding=12, seed=1)`: user attention whose weights are all random."""

    def make(unet: Any, tokens: int = 4, embedding: int = EMBEDDING, seed: int = 1) -> UserAdapter:
        return _randomise(UserAdapter.attach(unet, embedding, tokens), seed)

    return make


@pytest.fixture
def users() -> torch.Tensor:
    """Embeddings of two users, (2, 12)."""
    return torch.randn(2, EMBEDDING, generator=torch.Generator().manual_seed(9))


@pytest.fixture(scope="session")
def tiny_xl_pipeline(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random `StableDiffusionXLPipeline` for 32 x 32 images."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    stock: Any = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    config = stock.text_encoder.config.to_dict() | {"hidden_size": CONTEXT // 2, "projection_dim": CONTEXT}
    text = CLIPTextConfig.from_dict(config)
    folder = tmp_path_factory.mktemp("pipelines") / "tiny-xl"
    StableDiffusionXLPipeline(
        vae=stock.vae, text_encoder=CLIPTextModel(text), text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer=stock.tokenizer, tokenizer_2=stock.tokenizer, unet=_unet("sdxl"), scheduler=stock.scheduler,
        add_watermarker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder
