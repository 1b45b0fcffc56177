"""The toy world's CLIP: a transformers CLIPModel of 0.65 M parameters for 32x32 pictures."""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from lit_safety.bounded import load_json
from lit_safety.toyworld.folders import swap_in
from lit_safety.toyworld.scene import SIDE
from lit_safety.toyworld.text import tokenize
from lit_safety.toyworld.tokenizer import LENGTH, build_tokenizer
from lit_safety.toyworld.vae import to_tensor

WIDTH = 96
PATCH = 4


def new_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """An untrained CLIP: image tower of 4 layers over 8x8 patches, text tower of 2, both projected to `WIDTH`."""
    layers = {"hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_attention_heads": 4}
    return CLIPModel(
        CLIPConfig(
            vision_config={
                **layers, "num_hidden_layers": 4, "image_size": SIDE, "patch_size": PATCH, "projection_dim": WIDTH,
            },
            text_config={
                **layers, "num_hidden_layers": 2, "vocab_size": len(tokenizer), "max_position_embeddings": LENGTH,
                "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": tokenizer.pad_token_id, "projection_dim": WIDTH,
            },
            projection_dim=WIDTH,
        )
    )  # fmt: skip


def image_features(clip: CLIPModel, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Of pictures (B, 3, 32, 32) in [-1, 1]: pooled features (B, WIDTH), and projected ones of unit length."""
    pooled = clip.vision_model(pixel_values=pictures).pooler_output
    return pooled, torch.nn.functional.normalize(clip.visual_projection(pooled), dim=-1)


def text_features(clip: CLIPModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Of token ids (B, LENGTH): pooled features (B, WIDTH), and projected ones of unit length."""
    pooled = clip.text_model(input_ids=ids).pooler_output
    return pooled, torch.nn.functional.normalize(clip.text_projection(pooled), dim=-1)


@torch.no_grad()
def encode_pictures(clip: CLIPModel, pictures: NDArray[np.uint8] | Tensor, batch_size: int = 250) -> Tensor:
    """Projected features (N, WIDTH) of many pictures: uint8 (N, 32, 32, 3), or float (N, 3, 32, 32) in [-1, 1]."""
    inputs = pictures if isinstance(pictures, Tensor) else to_tensor(pictures)
    return torch.cat([image_features(clip, part)[1] for part in inputs.split(batch_size)])


@torch.no_grad()
def encode_texts(clip: CLIPModel, tokenizer: CLIPTokenizer, texts: list[str], batch_size: int = 500) -> Tensor:
    """Projected features (N, WIDTH) of many captions."""
    return torch.cat([text_features(clip, part)[1] for part in tokenize(tokenizer, texts).split(batch_size)])


def load_clip(folder: Path) -> tuple[CLIPModel, CLIPTokenizer]:
    """The shipped CLIP in float32, ready to score."""
    return CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)


def save_clip(clip: CLIPModel, target: Path, notes: str) -> None:
    """Writes model (float16), tokenizer, image processor and a README of `notes`, in one swap."""
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    build_tokenizer(part)
    clip.half().save_pretrained(part)
    # Tensors in [-1, 1], as the pipeline's autoencoder has them.
    CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE},
        image_mean=[0.5] * 3, image_std=[0.5] * 3,
    ).save_pretrained(part)  # fmt: skip
    settings = load_json((part / "config.json").read_text(encoding="utf-8"))
    for config in (settings, settings["text_config"], settings["vision_config"]):
        config["dtype"] = "float32"  # what a plain from_pretrained, also of one tower alone, then computes in
    (part / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (part / "README.md").write_text(notes, encoding="utf-8")
    (part / "model.safetensors").chmod(0o644)
    swap_in(part, target)
