"""Parameters, operations and memory of the flow-matching models at their true sizes, counted on a meta device.

    python benchmarks/flow.py --model flux1_dev --resolution 1024

Shapes alone: nothing is loaded, drawn or timed. One pair is two images; a step is the reference's forward pass, the
policy's with a LoRA on the family's own layers, and the backward pass, with inputs out of a cache. Memory is a lower
bound: bf16 weights, 16 bytes a trained number (weight, gradient, two moments), and what the backward pass keeps, in
bf16; caches of kernels, casts and fragments come on top.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from flops import META, counted
from networks import RandomParts
from torch import Tensor, nn

from lit_safety.adapters.lora import LoRA
from lit_safety.backbones.backbone import Backbone
from lit_safety.modules.strategies import blocks

RANK = 16
GB = 1e9
#: Bytes of a weight that is frozen, by how it is kept; 4 bits have a scale for every 64 weights.
FROZEN = {"bf16": 2.0, "8 bits": 1.0, "4 bits": 0.5 + 2 / 64}


@dataclass(frozen=True)
class Model:
    """A model at its true size."""

    family: str
    """File and class in `lit_safety.backbones`."""
    network: str
    """Class of its transformer in diffusers."""
    says: str
    """Where its size is from."""
    size: dict[str, Any] = field(default_factory=dict)
    """What differs from the class's defaults."""
    latents: tuple[int, int] = (16, 8)
    """Channels of its latents, and pixels that a side of one covers."""
    text: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Its conditioning by name, shapes without the batch; masks are full."""
    vae: dict[str, Any] = field(default_factory=dict)


DEFAULTS = "the defaults of diffusers' class"
CONVERTED = "diffusers' script that converts it"
KLEIN_4B = {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680}
KLEIN_9B = {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288}
SD35 = {"sample_size": 128, "in_channels": 16, "joint_attention_dim": 4096, "pooled_projection_dim": 2048,
        "qk_norm": "rms_norm"}  # fmt: skip
SD35_MEDIUM = SD35 | {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536,
                      "dual_attention_layers": tuple(range(13)), "pos_embed_max_size": 384}  # fmt: skip
SD35_LARGE = SD35 | {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432,
                     "pos_embed_max_size": 192}  # fmt: skip
MASKED = "encoder_hidden_states_mask"
MODELS = {
    "flux1_dev": Model("flux.Flux", "FluxTransformer2DModel", DEFAULTS, {"guidance_embeds": True},
                       text={"encoder_hidden_states": (512, 4096), "pooled_projections": (768,)}),
    "flux2_dev": Model("flux_2.Flux2", "Flux2Transformer2DModel", CONVERTED, {}, (128, 16),
                       {"encoder_hidden_states": (512, 15360)}),
    "flux2_klein_4b": Model("flux_2.Flux2Klein", "Flux2Transformer2DModel", CONVERTED,
                            KLEIN_4B | {"guidance_embeds": False}, (128, 16), {"encoder_hidden_states": (512, 7680)}),
    "flux2_klein_9b": Model("flux_2.Flux2Klein", "Flux2Transformer2DModel", CONVERTED,
                            KLEIN_9B | {"guidance_embeds": False}, (128, 16), {"encoder_hidden_states": (512, 12288)}),
    "qwen_image": Model("qwen_image.QwenImage", "QwenImageTransformer2DModel", DEFAULTS, {},
                        text={"encoder_hidden_states": (128, 3584), MASKED: (128,)},
                        vae={"latents_mean": [0.0] * 16, "latents_std": [1.0] * 16}),
    "z_image": Model("z_image.ZImage", "ZImageTransformer2DModel", DEFAULTS, {},
                     text={"encoder_hidden_states": (128, 2560), MASKED: (128,)}),
    "sana": Model("sana.Sana", "SanaTransformer2DModel", DEFAULTS, {}, (32, 32),
                  {"encoder_hidden_states": (300, 2304), "encoder_attention_mask": (300,)}),
    "sd35_medium": Model("stable_diffusion_3.StableDiffusion3", "SD3Transformer2DModel", "our knowledge of its config",
                         SD35_MEDIUM, text={"encoder_hidden_states": (333, 4096), "pooled_projections": (2048,)}),
    "sd35_large": Model("stable_diffusion_3.StableDiffusion3", "SD3Transformer2DModel", "our knowledge of its config",
                        SD35_LARGE, text={"encoder_hidden_states": (333, 4096), "pooled_projections": (2048,)}),
}  # fmt: skip


def backbone_of(model: Model) -> Backbone:
    """The family around a transformer without memory, in bf16."""
    import diffusers

    def transformer() -> Any:
        return getattr(diffusers, model.network)(**model.size).to(torch.bfloat16)

    def scheduler() -> Any:
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)

    makers: dict[str, Callable[[], Any]] = {"transformer": transformer, "text_encoder_3": transformer}
    parts = RandomParts(makers | {"scheduler": scheduler}, {"vae": model.vae, "transformer": model.size}, META)
    file, kind = model.family.split(".")
    family: type[Backbone] = getattr(import_module(f"lit_safety.backbones.{file}"), kind)
    return family(parts).requires_grad_(False).eval()


def inputs(model: Model, resolution: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Latents, timesteps and conditioning of one pair; masks have values, since lengths are read from them."""
    channels, pixels = model.latents
    side = resolution // pixels
    device = torch.device("cpu") if MASKED in model.text else META
    text = {
        name: torch.ones(2, *shape, device=device)
        if name == MASKED
        else torch.empty(2, *shape, device=META, dtype=torch.bfloat16)
        for name, shape in model.text.items()
    }
    latents = torch.empty(2, channels, side, side, device=META, dtype=torch.bfloat16)
    return latents, torch.empty(2, device=META), text


class Kept:
    """Within, the bytes that autograd keeps, weights not counted, and of them the most that one block keeps.

    Attention's matrices of all pairs of tokens are left out: the kernels of GPUs do not keep them.
    """

    def __init__(self, network: nn.Module, parts: list[nn.Module]) -> None:
        self.weights = {p.untyped_storage()._cdata for p in network.parameters()}
        self.parts = parts
        self.total = self.block = self.entering = 0
        self._held: dict[int, Tensor] = {}
        self._handles: list[Any] = []

    def _pack(self, tensor: Tensor) -> Tensor:
        storage, tokens = tensor.untyped_storage(), tensor.shape[-1] if tensor.ndim >= 3 else 0
        if tokens > 256 and tensor.shape[-2] == tokens:
            return tensor
        if storage._cdata not in self.weights and storage._cdata not in self._held:
            self._held[storage._cdata] = tensor
            self.total += storage.nbytes()
        return tensor

    def __enter__(self) -> Kept:
        begun: list[int] = []

        def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
            begun.append(self.total)
            given = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)]
            self.entering += sum(one.numel() * one.element_size() for one in given if one.ndim == 3)

        def end(module: nn.Module, args: Any, found: Any) -> None:
            self.block = max(self.block, self.total - begun.pop())

        for part in self.parts:
            self._handles += [part.register_forward_pre_hook(begin, with_kwargs=True), part.register_forward_hook(end)]
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
        for handle in self._handles:
            handle.remove()


def counts(model: Model, resolution: int) -> dict[str, float]:
    """Weights, trained numbers and their layers, TFLOP and bytes of a pair."""
    backbone = backbone_of(model)
    weights = sum(p.numel() for p in backbone.denoiser.parameters())
    given = inputs(model, resolution)
    with torch.no_grad():
        forward = counted(lambda: backbone.predict(*given))
    lora = LoRA(rank=RANK).with_targets(backbone.lora_targets())
    trained = lora.attach(backbone.denoiser, "policy")
    for weight in trained:
        weight.data = weight.data.to(torch.bfloat16)  # as autocast would compute with it
    step = counted(lambda: backbone.predict(*given).sum().backward())
    with Kept(backbone.denoiser, blocks(backbone.denoiser)) as kept:
        backbone.predict(*given)
    return {
        "weights": weights, "trained": sum(p.numel() for p in trained), "layers": len(trained) // 2,
        "forward": forward, "step": step, "kept": kept.total, "entering": kept.entering, "block": kept.block,
    }  # fmt: skip


def report(name: str, resolution: int, found: dict[str, float]) -> dict[str, Any]:
    """What a model costs, in the units that the overlays state."""
    weights, numbers, forward, step = (found[key] for key in ("weights", "trained", "forward", "step"))
    least = {how: weights * size / GB + 16 * numbers / GB for how, size in FROZEN.items()}
    checkpointed = (found["entering"] + found["block"]) / GB
    return {
        "model": name, "size from": MODELS[name].says, "resolution": resolution,
        "parameters, 1e9": round(weights / 1e9, 2), "LoRA, 1e6": round(numbers / 1e6, 1),
        "LoRA layers": round(found["layers"]),
        "TFLOP of a forward pass": round(forward, 1), "TFLOP forward and backward": round(step, 1),
        "TFLOP a pair": round(forward + step, 1), "TFLOP a pair, checkpointing": round(2 * forward + step, 1),
        "GB of weights": {how: round(weights * size / GB, 1) for how, size in FROZEN.items()},
        "GB of activations": round(found["kept"] / GB, 1), "GB of activations, checkpointing": round(checkpointed, 1),
        "GB at least, checkpointing": {how: round(one + checkpointed, 1) for how, one in least.items()},
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), nargs="+", default=list(MODELS))
    parser.add_argument("--resolution", type=int, default=1024)
    options = parser.parse_args()
    for one in options.model:
        found = counts(MODELS[one], options.resolution)
        print(json.dumps(report(one, options.resolution, found), indent=1), flush=True)
