"""A step under DeepSpeed that computes what it does under every other strategy.

Lightning's own plugin does not. Under bf16-mixed it rounds all weights and every number of a batch to bfloat16:
latents, costs and a cached reference's errors too; and pictures' fp32 latents meet half-precision weights, which no
convolution takes. And of k accumulated batches each loss is divided by k twice, by Lightning's loop and by DeepSpeed's
engine: gradients are k times too small, which Adam hides, but not gradient clipping, Adam's epsilon or SGD.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from torch import Tensor

from lit_safety.errors import UserError


class DeepSpeedStep(DeepSpeedPrecision):
    """Leaves a loss that Lightning has divided undivided by DeepSpeed, and batches as they are in autocast.

    Args:
        precision: of the trainer.
        autocast: whether DeepSpeed's engine computes in autocast, by `torch_autocast` of its configuration.
    """

    def __init__(self, precision: Any, autocast: bool) -> None:
        super().__init__(precision)
        self.autocast = autocast

    def convert_input(self, data: Any) -> Any:
        return data if self.autocast else super().convert_input(data)

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        # DeepSpeed's autocast keeps casts of trained weights. One made in a pass without gradient, such as selective
        # backward's first, would be found by the pass with gradient, and the weights would get none.
        kept = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            with super().forward_context():
                yield
        finally:
            torch.set_autocast_cache_enabled(kept)

    def backward(self, tensor: Tensor, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        super().backward(tensor, model, optimizer, *args, scale_wrt_gas=False, **kwargs)


def set_step(strategy: Any) -> None:
    """Give ``strategy``, a `DeepSpeedStrategy` that has not begun, this step; a DeepSpeed configuration of the user's
    that says `bf16` itself keeps its precision, and a plugin of the user's is left alone.

    Raises:
        UserError: 16-mixed, which DeepSpeed knows only as weights in float16.
    """
    plugin = strategy.precision_plugin
    if plugin.precision == "16-mixed":
        raise UserError(
            "`trainer.precision: 16-mixed` under DeepSpeed would round all weights to float16: set it to bf16-mixed or "
            "32-true, or use `--config configs/strategies/ddp.yaml`"
        )
    if type(plugin) is not DeepSpeedPrecision:
        return
    autocast = plugin.precision == "bf16-mixed" and "bf16" not in strategy.config
    strategy.precision_plugin = DeepSpeedStep(plugin.precision, autocast)
    if autocast:
        strategy.config["bf16"] = {"enabled": False}
        # No module is named whose gradients would be sent in bfloat16.
        settings = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        strategy.config.setdefault("torch_autocast", settings)
