"""Models of the true shapes with random weights: in memory (on a meta device too), or as a pipeline on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from lit_safety.backbones.backbone import Backbone
from lit_safety.backbones.load import load_backbone
from lit_safety.backbones.parts import Parts
from lit_safety.backbones.stable_diffusion import StableDiffusion
from lit_safety.backbones.stable_diffusion_xl import StableDiffusionXL
from lit_safety.data.format.writer import ShardWriter

TOY = Path(__file__).parents[1] / "data" / "toyworld"
MODELS = ("toy", "sd15", "sdxl")
#: Widths of Stable Diffusion 1.5's UNet, VAE and text encoder, text layers, groups of the normalisations.
SCALES: dict[str, dict[str, Any]] = {
    "small": {"unet": (32, 64, 128, 128), "vae": (16, 32, 64, 64), "text": 96, "layers": 2, "groups": 16},
    "quarter": {"unet": (80, 160, 320, 320), "vae": (32, 64, 128, 128), "text": 192, "layers": 12, "groups": 16},
    "full": {"unet": (320, 640, 1280, 1280), "vae": (128, 256, 512, 512), "text": 768, "layers": 12, "groups": 32},
}
#: SDXL's at its full size, and a sixteenth of its operations.
XL_SCALES: dict[str, dict[str, Any]] = {
    "quarter": {
        "unet": (80, 160, 320),
        "vae": (32, 64, 128, 128),
        "text": (192, 320),
        "groups": 16,
        "heads": (2, 4, 8),
    },
    "full": {
        "unet": (320, 640, 1280),
        "vae": (128, 256, 512, 512),
        "text": (768, 1280),
        "groups": 32,
        "heads": (5, 10, 20),
    },
}
#: Stable Diffusion 3.5 medium's transformer, by what we know of its configuration.
FLOW_SCALES: dict[str, dict[str, Any]] = {
    "small": {
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "caption_projection_dim": 64,
        "joint_attention_dim": 96,
        "pooled_projection_dim": 64,
        "in_channels": 16,
        "sample_size": 32,
        "pos_embed_max_size": 64,
    },
    "full": {
        "num_layers": 24,
        "num_attention_heads": 24,
        "attention_head_dim": 64,
        "caption_projection_dim": 1536,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 2048,
        "in_channels": 16,
        "sample_size": 128,
        "pos_embed_max_size": 384,
        "qk_norm": "rms_norm",
        "dual_attention_layers": tuple(range(13)),
    },
}
RESOLUTION = {"sd15": 512, "sdxl": 1024}
#: DDPM's noise as both families were trained with.
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


class RandomParts(Parts):
    """Components by name, made with random weights on a device when they are first used.

    Args:
        makers: by name.
        configs: of the networks, by name.
        device: where they are made; meta: shapes alone, without memory.
    """

    def __init__(
        self, makers: dict[str, Callable[[], Any]], configs: dict[str, dict[str, Any]], device: torch.device
    ) -> None:
        self.source = "random weights"
        self.index: Any = SimpleNamespace(components=makers, settings={}, is_local=True)
        self._loaded = {}
        self._configs = configs
        self._device = device

    def _load(self, name: str) -> Any:
        with self._device:
            part = self.index.components[name]()
        return part.requires_grad_(False).eval() if isinstance(part, nn.Module) else part

    def config(self, name: str) -> dict[str, Any]:
        return self._configs[name]


def parts_of(model: str, scale: str, device: torch.device) -> Parts:
    """Fresh components of `toy` (its own weights), `sd15` or `sdxl`."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    if model == "toy":
        return Parts(str(TOY / "pipeline"))
    size = SCALES[scale] if model == "sd15" else XL_SCALES[scale]
    vae = {
        "block_out_channels": size["vae"],
        "layers_per_block": 2,
        "latent_channels": 4,
        "norm_num_groups": size["groups"],
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "scaling_factor": 0.18215 if model == "sd15" else 0.13025,
    }
    makers: dict[str, Callable[[], Any]] = {
        "vae": lambda: AutoencoderKL(**vae),
        "scheduler": lambda: DDPMScheduler(**SCHEDULE),
    }
    if model == "sd15":
        unet = sd15_unet(size)
        makers["text_encoder"] = lambda: CLIPTextModel(text_config(size["text"], size["layers"], 12, "quick_gelu"))
    else:
        unet = sdxl_unet(size)
        first, second = size["text"]
        makers["text_encoder"] = lambda: CLIPTextModel(text_config(first, 12, 12, "quick_gelu"))
        makers["text_encoder_2"] = lambda: CLIPTextModelWithProjection(text_config(second, 32, 20, "gelu"))
    makers["unet"] = lambda: UNet2DConditionModel(**unet)
    return RandomParts(makers, {"vae": vae, "unet": unet}, device)


def sd15_unet(size: dict[str, Any]) -> dict[str, Any]:
    """The configuration of Stable Diffusion 1.5's UNet at a scale; `attention_head_dim` is a number of heads."""
    return {
        "sample_size": 64,
        "block_out_channels": size["unet"],
        "layers_per_block": 2,
        "cross_attention_dim": size["text"],
        "attention_head_dim": 8,
        "norm_num_groups": size["groups"],
    }


def sdxl_unet(size: dict[str, Any]) -> dict[str, Any]:
    """The configuration of SDXL's UNet at a scale."""
    return {
        "sample_size": 128,
        "block_out_channels": size["unet"],
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 2,
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": size["heads"],
        "cross_attention_dim": sum(size["text"]),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": size["text"][1] + 6 * 256,
        "norm_num_groups": size["groups"],
    }


def text_config(width: int, layers: int, heads: int, activation: str, **words: Any) -> Any:
    """Of a CLIP text encoder of 77 tokens."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=77,
        hidden_act=activation,
        projection_dim=width,
        **words,
    )


def backbone_of(model: str, scale: str, device: torch.device) -> Backbone:
    """The backbone around fresh components, frozen; encoders are not made until they are used."""
    if model == "toy":
        return load_backbone(str(TOY / "pipeline")).to(device)
    if model == "sd35":
        return flow_backbone(scale, device)
    family = StableDiffusion if model == "sd15" else StableDiffusionXL
    return family(parts_of(model, scale, device)).requires_grad_(False).eval()


def flow_backbone(scale: str, device: torch.device) -> Backbone:
    """Stable Diffusion 3.5 medium's family around a fresh transformer; its encoders cannot be used."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

    from lit_safety.backbones.stable_diffusion_3 import StableDiffusion3

    size = FLOW_SCALES[scale]
    makers: dict[str, Callable[[], Any]] = {
        "transformer": lambda: SD3Transformer2DModel(**size),
        "scheduler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
        "text_encoder_3": lambda: None,
    }
    vae = {"block_out_channels": (128, 256, 512, 512), "latent_channels": 16}
    parts = RandomParts(makers, {"transformer": size, "vae": vae}, device)
    return StableDiffusion3(parts).requires_grad_(False).eval()


def random_pipeline(folder: Path, scale: str) -> Path:
    """A pipeline of Stable Diffusion 1.5's shape on disk; the toy world's words."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextModel, CLIPTokenizer

    size = SCALES[scale]
    tokenizer = CLIPTokenizer.from_pretrained(TOY / "pipeline" / "tokenizer", model_max_length=77)
    words = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    heads = size["text"] // 32 if scale == "small" else 12
    parts = parts_of("sd15", scale, torch.device("cpu"))
    scheduler = DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    pipe: Any = StableDiffusionPipeline(
        vae=parts.get("vae"),
        text_encoder=CLIPTextModel(text_config(size["text"], size["layers"], heads, "quick_gelu", **words)),
        tokenizer=tokenizer,
        unet=parts.get("unet"),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    return folder


def random_pairs(folder: Path, count: int, resolution: int) -> Path:
    """Noise for images: what is in them costs no time."""
    random = np.random.default_rng(0)

    def image() -> Image.Image:
        return Image.fromarray(random.integers(0, 256, (resolution, resolution, 3), dtype=np.uint8))

    known = {"prompt_kind": "harmful", "order": "safety", "harmful": {"chosen": False, "rejected": True}}
    with ShardWriter(folder, samples_per_shard=max(count // 4, 1), image_format="jpg") as writer:
        for number in range(count):
            cost = {"chosen": -1.0, "rejected": 1.0}
            writer.write(f"{number:05d}", {**known, "prompt": f"a red cat {number}", "cost": cost}, image(), image())
    return folder


def weights_size(*networks: nn.Module) -> int:
    """Bytes of weights."""
    return sum(p.numel() * p.element_size() for network in networks for p in network.parameters())
