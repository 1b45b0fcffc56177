"""Task arithmetic: the weighted sum of the updates (Ilharco et al., arXiv 2212.04089)."""

from __future__ import annotations

from collections.abc import Sequence

from lit_safety.adapters.lora_file import LowRank
from lit_safety.merging.factors import stack


def task_sum(parts: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """sum_k w_k delta_k, exactly, as one LoRA of rank sum_k r_k: a = [a_1; ...], b = [w_1 s_1 b_1 ...]."""
    return stack(parts, weights)
