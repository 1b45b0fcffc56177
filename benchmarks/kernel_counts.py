"""Kernels and bytes of a forward and backward pass outside of matrix products, counted on fake tensors.

    python benchmarks/kernel_counts.py --model sd15

A GPU waits for what launches kernels and for what moves memory without computing. Both can be counted without a GPU: a
denoiser of the true shapes runs one image forward and backward under bf16 autocast on tensors that have shapes and no
memory, and every operation is counted that would be a kernel. Views are none. Matrix products, convolutions and
attention are counted apart. Bytes are what an operation reads and writes; what several of its inputs share is counted
once for each.

Autocast of a CPU casts fewer operations than a GPU's, so the GPU's list for normalisations is followed here: they
compute in fp32.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from networks import MODELS, RESOLUTION, backbone_of
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_safety.adapters.lora import LoRA
from lit_safety.backbones.lowered import lower_frozen

#: Matrix products by the names of their operations; convolutions and attention are such.
MATMULS = ("mm", "addmm", "bmm", "baddbmm", "addmm_", "convolution", "attention")
#: The layers of `configs/scdpo.yaml`, and those that the published trainers adapt.
TARGETS = {
    "all": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"],
    "attention": ["to_q", "to_k", "to_v", "to_out.0"],
}
#: What launches nothing although torch does not call it a view.
FREE = ("device", "detach", "_unsafe_view", "lift_fresh", "empty", "new_empty", "empty_like", "empty_strided", "alias")


class Kernels(TorchDispatchMode):
    """Counts the operations that run within, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and name not in FREE:
            given = [one for one in tree_leaves((args, kwargs or {})) if isinstance(one, Tensor)]
            out = [one for one in tree_leaves(found) if isinstance(one, Tensor)]
            self.counts[name] += 1
            self.bytes[name] += sum(one.numel() * one.element_size() for one in [*given, *out])
        return found

    def outside(self) -> tuple[int, float]:
        """Kernels, and gigabytes read and written, without matrix products."""
        names = [name for name in self.counts if not is_matmul(name)]
        return sum(self.counts[name] for name in names), sum(self.bytes[name] for name in names) / 1e9


def is_matmul(name: str) -> bool:
    """Whether an operation is a matrix product, a convolution or attention, forward or backward."""
    return name in MATMULS or "convolution" in name or "attention" in name


class AsOnGPU(TorchFunctionMode):
    """Normalisations in fp32, as autocast has them on a GPU and not on a CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (nn.functional.layer_norm, nn.functional.group_norm) and torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                wide = [one.float() if isinstance(one, Tensor) else one for one in args]
                named = {key: one.float() if isinstance(one, Tensor) else one for key, one in (kwargs or {}).items()}
                return func(*wide, **named)
        return func(*args, **(kwargs or {}))


@contextmanager
def counting() -> Iterator[Kernels]:
    """Within, what runs on fake tensors is counted as a GPU would run it."""
    with AsOnGPU(), Kernels() as kernels:
        yield kernels


def denoiser_pass(
    model: str, scale: str, resolution: int, lora: LoRA | None, images: int = 1, lowered: bool = True
) -> Kernels:
    """One forward and backward pass of a denoiser, an adapter of ``lora`` on it, under bf16 autocast.

    Args:
        lora: None: no adapter; the gradient then goes to the network's input, so that all of it is passed backward.
        lowered: whether frozen weights lie in bfloat16, as a fit in bf16-mixed has them.
    """
    backbone = backbone_of(model, scale, torch.device("meta"))
    unet: Any = backbone.denoiser
    if lora is not None:
        lora.attach(unet, "policy")
    if lowered:
        lower_frozen(unet, torch.bfloat16)
    with FakeTensorMode():
        _fake(unet)
        config = unet.config
        latent = torch.empty(images, config.in_channels, resolution // 8, resolution // 8, requires_grad=lora is None)
        words = torch.empty(images, 77, config.cross_attention_dim)
        added = None
        if config.addition_embed_type == "text_time":
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            added = {"text_embeds": torch.empty(images, pooled), "time_ids": torch.empty(images, 6)}
        steps = torch.zeros(images, dtype=torch.long)
        with counting() as kernels:
            with torch.autocast("cpu", torch.bfloat16):
                found = unet(latent, steps, words, added_cond_kwargs=added).sample
            found.float().square().mean().backward()
    return kernels


def _fake(network: nn.Module) -> None:
    """Fake weights for those of a meta device, which autocast leaves alone."""
    for layer in network.modules():
        for name, weight in layer.named_parameters(recurse=False):
            fake = torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype)
            layer.register_parameter(name, nn.Parameter(fake, weight.requires_grad))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=[one for one in MODELS if one != "toy"], default="sd15")
    parser.add_argument("--scale", choices=["small", "quarter", "full"], default="full")
    parser.add_argument("--resolution", type=int, help="pixels; the model's own by default")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", choices=list(TARGETS), default="all", help="the adapted layers")
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--names", action="store_true", help="how often each operation runs, too")
    options = parser.parse_args()
    resolution = options.resolution or RESOLUTION[options.model]
    arms: dict[str, LoRA | None] = {
        "PEFT's forward": LoRA(options.rank, target_modules=TARGETS[options.targets], forward="peft"),
        "ours": LoRA(options.rank, target_modules=TARGETS[options.targets]),
        "no LoRA": None,
    }
    table = {}
    for name, lora in arms.items():
        found = denoiser_pass(options.model, options.scale, resolution, lora, options.images)
        kernels, gigabytes = found.outside()
        table[name] = {"kernels": kernels, "GB": round(gigabytes, 2)}
        table[name]["matrix products"] = sum(found.counts.values()) - kernels
        if options.names:
            table[name]["names"] = dict(found.counts.most_common())
    print(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
