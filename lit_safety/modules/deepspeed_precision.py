"""bf16-mixed under DeepSpeed as under every other strategy: a step in autocast, weights and batches in fp32.

Lightning's own plugin rounds all weights and every number of a batch to bfloat16: latents, costs and a cached
reference's errors too; and pictures' fp32 latents meet half-precision weights, which no convolution takes.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch.plugins.precision import DeepSpeedPrecision

from lit_safety.errors import UserError


class DeepSpeedAutocast(DeepSpeedPrecision):
    """Leaves batches as they are; DeepSpeed's engine computes in autocast, by `torch_autocast` of its configuration."""

    def convert_input(self, data: Any) -> Any:
        return data


def set_precision(strategy: Any) -> None:
    """Give ``strategy``, a `DeepSpeedStrategy` that has not begun, this precision; a DeepSpeed configuration of the
    user's that says `bf16` itself is left alone.

    Raises:
        UserError: 16-mixed, which DeepSpeed knows only as weights in float16.
    """
    precision = strategy.precision_plugin.precision
    if precision == "16-mixed":
        raise UserError(
            "`trainer.precision: 16-mixed` under DeepSpeed would round all weights to float16: set it to bf16-mixed or "
            "32-true, or use `--config configs/strategies/ddp.yaml`"
        )
    if precision != "bf16-mixed" or "bf16" in strategy.config:
        return
    strategy.config["bf16"] = {"enabled": False}
    # No module is named whose gradients would be sent in bfloat16.
    autocast = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    strategy.config.setdefault("torch_autocast", autocast)
    strategy.precision_plugin = DeepSpeedAutocast(precision)
