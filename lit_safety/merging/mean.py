"""The weighted mean of the updates. (Not the product of the means of A and B, which is another update.)"""

from __future__ import annotations

from collections.abc import Sequence

from lit_safety.adapters.lora_file import LowRank
from lit_safety.errors import UserError
from lit_safety.merging.factors import stack


def mean(parts: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """sum_k w_k delta_k / sum_k w_k, exactly, as one LoRA of rank sum_k r_k; a missing layer counts as a zero update.

    Raises:
        UserError: if the weights add up to nothing.
    """
    total = sum(weights)
    if abs(total) < 1e-12:
        raise UserError(f"--weights {list(weights)} add up to {total:g}, and a mean divides by that; use --method sum")
    return stack(parts, [weight / total for weight in weights])
