"""Operations counted on a meta device (shapes alone, no memory), and the matrix-multiply ceiling of a device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from arms import Ours, Published
from networks import parts_of
from recipes import RANK, half_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lit_safety.adapters.lora import LoRA

META = torch.device("meta")
#: TFLOP an image, of the true sizes: UNet forward, UNet forward and backward with the LoRA, VAE encode, text.
FLOOR = {
    ("sd15", "full"): {"UNet forward": 0.803, "UNet forward + backward": 1.725, "VAE encode": 1.117, "text": 0.013},
    ("sdxl", "full"): {"UNet forward": 6.761, "UNet forward + backward": 14.188, "VAE encode": 4.879},
}
#: TFLOP a pair: the published recipe, cached inputs, cached reference.
PAIR_FLOOR = {("sd15", "full"): (7.30, 5.06, 3.45), ("sdxl", "full"): (51.7, 41.9, 28.4)}
#: The same where the published recipe computes all activations twice. Fewer are counted: torch ends the second pass of
#: a block at the last activation that its backward pass needs.
PAIR_FLOOR_CHECKPOINTING = {("sdxl", "full"): (65.2, 41.9, 28.4)}


def counted(function: Callable[[], Any]) -> float:
    """TFLOP of a call. Attention is counted as the two products that it is, whatever kernel would compute it."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops() / 1e12


def parts_table(model: str, scale: str, resolution: int) -> dict[str, float]:
    """TFLOP an image of each part."""
    arm = Published(model, scale, META, 1, resolution, checkpointing=False)
    images = arm.images[:1]
    condition = {name: _first(value) for name, value in arm.condition(arm.tokens, resolution).items()}
    unet, parts = arm.policy, parts_of(model, scale, META)
    latent = torch.empty(1, 4, *(side // 8 for side in images.shape[-2:]), device=META)
    step = torch.zeros(1, dtype=torch.long, device=META)

    def forward() -> Any:
        return unet(latent, step, **condition).sample

    plain = parts.get("unet")
    LoRA(rank=RANK).attach(plain, "policy")
    with torch.no_grad():
        found = {"UNet forward": counted(lambda: arm.reference(latent, step, **condition))}
    found["UNet forward + backward"] = counted(lambda: forward().sum().backward())
    with torch.no_grad():
        found["VAE encode"] = counted(lambda: arm.vae.encode(images))
        found["text"] = counted(lambda: arm.condition(arm.tokens, resolution))
    return found


def _first(value: Any) -> Any:
    return {name: one[:1] for name, one in value.items()} if isinstance(value, dict) else value[:1]


def pair_table(model: str, scale: str, resolution: int, checkpointing: bool = False) -> dict[str, float]:
    """TFLOP a pair of each arm's whole step, counted on the step itself."""
    published = Published(model, scale, META, 1, resolution, checkpointing)
    ours = Ours(model, scale, META, 1, resolution)
    return {
        "published": counted(published.step),
        "cached": counted(lambda: ours.step(False)),
        "reference cache": counted(lambda: ours.step(True)),
    }


def blocks_table(model: str, scale: str, resolution: int) -> dict[str, float]:
    """TFLOP a pair with a cached reference, adapters everywhere and in the middle and upper blocks alone."""
    found = {}
    for name, blocks in (("all blocks", None), ("mid and up blocks", ["mid_block", "up_blocks"])):
        arm = Ours(model, scale, META, 1, resolution, blocks=blocks)
        found[name] = counted(lambda arm=arm: arm.step(True))  # type: ignore[misc]
    return found


def ceiling(device: torch.device, seconds: float = 1.0) -> float:
    """TFLOP/s of a large matrix product in the precision of the benchmark, the median of what fits into `seconds`."""
    size = 8192 if device.type == "cuda" else 1536
    kind = half_of(device) or torch.float32
    left, right = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < 3 or time.perf_counter() < end:
        began = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(2 * size**3 / (time.perf_counter() - began) / 1e12)
    return statistics.median(found)
