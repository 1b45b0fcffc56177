"""An arm's weights for attacks with gradients: a backbone with the same networks as the pipeline that draws."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lit_safety.backbones.backbone import Backbone
from lit_safety.backbones.load import family_of
from lit_safety.backbones.parts import Parts
from lit_safety.drawing.pipelines import load_pipeline

if TYPE_CHECKING:
    from lit_safety.drawing.arms import Arm


class PipelineParts(Parts):
    """The components of a pipeline that is already loaded.

    Args:
        source: the pipeline's folder.
        pipe: the pipeline.
    """

    def __init__(self, source: str, pipe: Any) -> None:
        super().__init__(source)
        self._pipe = pipe

    def _load(self, name: str) -> Any:
        part = self._pipe.components[name]
        return part.requires_grad_(False).eval() if isinstance(part, nn.Module) else part


@dataclass(frozen=True)
class Network:
    """An arm's networks in fp32, with its adapters fused into the weights."""

    backbone: Backbone
    pipe: Any
    """A pipeline with the same networks: training `backbone` changes its images."""
    resolution: int
    """Side of its images in pixels."""

    def encoders(self) -> list[tuple[Any, Any]]:
        """Every text encoder with its tokenizer."""
        parts = self.backbone.parts
        names = [name for name, _ in self.backbone.TOKENIZERS if parts.has(name)]
        return [(parts.get(name), self.backbone.part(name.replace("tokenizer", "text_encoder"))) for name in names]


def open_network(folder: Path, arm: Arm, device: str, resolution: int | None = None) -> Network:
    """Load an arm for an attacker who has its weights.

    Args:
        folder: the arm's pipeline.
        arm: the arm with its LoRAs; its guard is left out.
        device: the device to load to.
        resolution: side of the images of the attack; None: the pipeline's own.

    Raises:
        UserError: the pipeline or an adapter does not load, or no backbone knows the pipeline's family.
    """
    family = family_of(str(folder))
    pipe = load_pipeline(folder, replace(arm, guard=None), device, "float32")
    if arm.loras():
        pipe.unload_lora_weights()  # adapters were fused in fp32, so this only removes empty layers
    backbone = family(PipelineParts(str(folder), pipe)).requires_grad_(False).eval()
    return Network(backbone, pipe, resolution or _own_side(pipe))


def taught(encoder: Any) -> torch.Tensor:
    """Which rows of a text encoder's token embedding are not 0 (V,).

    An encoder that was trained on a few of its tokenizer's words may have zeros for the others. Such words have no
    meaning for it, so attacks do not use them.
    """
    weight = encoder.get_input_embeddings().weight.detach()
    return (weight != 0).any(dim=1)


def _own_side(pipe: Any) -> int:
    """Side in pixels of the images that a pipeline draws by default."""
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    side = getattr(denoiser.config, "sample_size", None) or getattr(pipe, "default_sample_size", 128)
    return int(side * pipe.vae_scale_factor)


def compute_threads(network: Network) -> int:
    """Threads of one operation while an attack computes: 1 for small networks on a CPU.

    This is faster for them and gives the same digits on any number of cores.
    """
    from lit_safety.drawing.threads import is_small_on_cpu

    return 1 if is_small_on_cpu(network.pipe) else torch.get_num_threads()
