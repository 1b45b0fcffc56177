"""Random experts of a few small layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from lit_safety.adapters.low_rank import LowRank
from lit_safety.merging.experts import Expert

#: Layer -> (out, in), and what every expert adapts unless told otherwise.
SIZES = {"unet.mid.to_q": (6, 5), "unet.mid.to_k": (4, 7)}


@pytest.fixture
def make_expert() -> Callable[..., Expert]:
    """`make_expert(name, seed, rank=2, scale=0.5, sizes=SIZES)`"""

    def make(
        name: str,
        seed: int,
        rank: int = 2,
        scale: float = 0.5,
        sizes: Mapping[str, tuple[int, int]] = SIZES,
        dtype: torch.dtype = torch.float32,
    ) -> Expert:
        generator = torch.Generator().manual_seed(seed)
        layers = {
            layer: LowRank(
                torch.randn(rank, inputs, generator=generator).to(dtype),
                torch.randn(out, rank, generator=generator).to(dtype),
                scale,
            )
            for layer, (out, inputs) in sizes.items()
        }
        return Expert(name, layers)

    return make


@pytest.fixture
def save_expert(tiny_pipeline: Path) -> Callable[..., Path]:
    """`save_expert(folder, seed, rank=4, alpha=8.0)`: a random LoRA of the tiny pipeline, written by the library."""
    from lit_safety.adapters import LoRA
    from lit_safety.backbones import load_backbone

    def save(folder: Path, seed: int, rank: int = 4, alpha: float = 8.0, pipeline: Path = tiny_pipeline) -> Path:
        backbone = load_backbone(str(pipeline))
        generator = torch.Generator().manual_seed(seed)
        for parameter in LoRA(rank=rank, alpha=alpha).attach(backbone.denoiser, "policy"):
            parameter.data.normal_(0, 0.2, generator=generator)
        backbone.save_lora(folder, "policy")
        (folder / "README.md").write_text(f"---\nlibrary_name: diffusers\nbase_model: {pipeline}\n---\n\n# x\n")
        return folder

    return save
