"""Linear-DPO (Li et al., arXiv 2605.21123): a linear utility of the margin instead of the sigmoid.

The sigmoid's slope falls as a pair's margin grows, so correctly ordered pairs teach little, and with a high beta these
are nearly all pairs. A linear utility has the same slope everywhere. It does not stop by itself: in the paper the
reference follows the policy (`model.init_args.stability.reference_decay`), and margins are measured from it.
"""

from __future__ import annotations

from torch import Tensor

from lit_safety.objectives.objective import Objective, PairLabels


def linear_loss(m: Tensor, limit: float | None = None) -> Tensor:
    """-m, margin (B,) in logits -> loss (B,); with a limit -min(m, limit): a pair above the limit has no gradient."""
    return -m if limit is None else -m.clamp(max=limit)


class LinearDPO(Objective):
    """Every pair has a slope of beta / 2 on each error, twice that of Diffusion-DPO at a margin of 0.

    Args:
        beta: strength of the preference in logits per unit of error, as beta_dpo of the Diffusion-DPO code.
        limit: margin in logits above which a pair is not pushed any more; null: no limit.
        sft_weight: weight of the chosen image's own denoising error; 0 turns the term off.
        anchor_weight: weight of the squared distance to the reference's prediction on clean prompts; 0 is off.

    Raises:
        ValueError: ``limit`` is not above 0.
    """

    def __init__(
        self, beta: float = 5000.0, limit: float | None = None, sft_weight: float = 0.0, anchor_weight: float = 0.0
    ) -> None:
        super().__init__(beta, sft_weight, anchor_weight)
        if limit is not None and not 0 < limit < float("inf"):
            raise ValueError(f"limit must be above 0, got {limit}")
        self.limit = limit

    def preference(self, m: Tensor, labels: PairLabels) -> Tensor:
        return linear_loss(m, self.limit)
