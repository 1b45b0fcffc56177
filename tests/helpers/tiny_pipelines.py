"""Tiny random pipelines of every family, for 32 x 32 images, as `save_pretrained` writes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WORDS = ["a", "red", "blue", "cat", "house", "gun", "and", "with"]


def clip_tokenizer(folder: Path, pad: str = "<|endoftext|>") -> Any:
    """A `CLIPTokenizer` of 16 places that knows `WORDS`; its files go into ``folder``."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted({c for w in WORDS for c in w})
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters), "!"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    files = (str(folder / "vocab.json"), str(folder / "merges.txt"))
    return CLIPTokenizer(*files, model_max_length=16, pad_token=pad)


def clip_text(width: int, projection: bool) -> Any:
    """A random CLIP text encoder of ``width``, with or without the pooled projection."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=64, hidden_size=width, intermediate_size=37, num_attention_heads=4, num_hidden_layers=3,
        max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1, projection_dim=width,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def vae(channels: int, **settings: Any) -> Any:
    """A random KL autoencoder that makes 8 x 8 latents of 32 x 32 images."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=channels, block_out_channels=(8, 16, 16), norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, **settings,
    )  # fmt: skip


def save_sdxl(folder: Path, seed: int = 0, zeros: bool = True, prediction_type: str = "epsilon") -> Path:
    """A `StableDiffusionXLPipeline` with text encoders of 32 and 16 numbers a token.

    Args:
        folder: where to.
        seed: of its weights.
        zeros: its `force_zeros_for_empty_prompt`.
        prediction_type: epsilon or v_prediction.
    """
    import torch
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(32, 64),
        norm_num_groups=8, attention_head_dim=8, cross_attention_dim=48, transformer_layers_per_block=(1, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )  # fmt: skip
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type,
        steps_offset=1, timestep_spacing="leading",
    )  # fmt: skip
    words = folder.parent / f"{folder.name}-vocabulary"
    StableDiffusionXLPipeline(
        vae=vae(4, scaling_factor=0.13025), text_encoder=clip_text(32, False), text_encoder_2=clip_text(16, True),
        tokenizer=clip_tokenizer(words), tokenizer_2=clip_tokenizer(words, pad="!"), unet=unet, scheduler=scheduler,
        force_zeros_for_empty_prompt=zeros, add_watermarker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def save_sd3(folder: Path, seed: int = 0, without: Sequence[str] = (), shift: float = 3.0, channels: int = 4) -> Path:
    """A `StableDiffusion3Pipeline` with CLIP encoders of 32 and 16 numbers a token and a T5 of 64.

    Args:
        folder: where to.
        seed: of its weights.
        without: endings of the text encoders that it ships without: "", "_2", "_3".
        shift: of its scheduler.
        channels: of its latents.
    """
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=channels, out_channels=channels, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=48,
        pos_embed_max_size=16,
    )  # fmt: skip
    words = folder.parent / f"{folder.name}-vocabulary"
    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        *((f"\u2581{word}", -2.0) for word in WORDS),
        ("\u2581", -3.0),
    ]
    t5 = T5Config(vocab_size=64, d_model=64, d_kv=8, d_ff=37, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu")
    parts = {
        "text_encoder": clip_text(32, True), "text_encoder_2": clip_text(16, True),
        "text_encoder_3": T5EncoderModel(t5),
        "tokenizer": clip_tokenizer(words), "tokenizer_2": clip_tokenizer(words, pad="!"),
        "tokenizer_3": T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512),
    }  # fmt: skip
    for ending in without:
        parts |= {f"text_encoder{ending}": None, f"tokenizer{ending}": None}
    StableDiffusion3Pipeline(
        vae=vae(channels, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=shift), **parts,
    ).save_pretrained(folder)  # fmt: skip
    return folder
