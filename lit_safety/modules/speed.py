"""How a step is computed, for speed or memory; what it teaches stays the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from lit_safety.errors import UserError
from lit_safety.modules.selective import SelectiveBackward


@dataclass
class Speed:
    """Options of a step.

    Args:
        compile: backend of torch.compile for the denoiser's repeated blocks, such as inductor; null: not compiled.
        gradient_checkpointing: compute activations a second time in the backward pass instead of keeping them: less
            memory, a slower step.
        selective: train on all pairs that still teach something and on a random part of the others; null: on all.
        margin_limit: the largest |m| in logits that a cached or compiled reference may show before the first update.
    """

    compile: str | None = None
    gradient_checkpointing: bool = False
    selective: SelectiveBackward | None = None
    margin_limit: float = 0.05

    def apply(self, denoiser: nn.Module) -> None:
        """Prepare the denoiser, its adapters attached.

        Raises:
            UserError: torch knows no such backend, or the denoiser does not name its repeated blocks.
        """
        network: Any = denoiser
        if self.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        if self.compile is None:
            return
        import torch._dynamo

        if self.compile not in (known := torch._dynamo.list_backends(exclude_tags=())):
            raise UserError(f"`model.init_args.speed.compile: {self.compile}` is none of {', '.join(known)}")
        # Adapters on and off, training and not, are some graphs each, and two blocks of a kind share them.
        torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 64)
        try:
            network.compile_repeated_blocks(backend=self.compile)
        except ValueError as error:
            raise UserError(
                f"`model.init_args.speed.compile`: {type(denoiser).__name__} names no repeated blocks; leave it null"
            ) from error
