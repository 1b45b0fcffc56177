"""Linear-DPO (Li et al., arXiv 2605.21123): a linear utility of the margin in the place of the sigmoid.

The sigmoid's slope falls as a pair's margin grows, so that pairs which are in order teach little, and at a high beta
nearly all of them are. A linear utility teaches by the same slope throughout. It does not end by itself: the paper lets
the reference follow the policy (`model.init_args.stability.reference_decay`), from which margins are then counted.
"""

from __future__ import annotations

from torch import Tensor

from lit_safety.objectives.objective import Objective, PairLabels


def linear_loss(m: Tensor, limit: float | None = None) -> Tensor:
    """-m, margin (B,) in logits -> loss (B,); with a limit -min(m, limit): a pair beyond it has no gradient."""
    return -m if limit is None else -m.clamp(max=limit)


class LinearDPO(Objective):
    """Every pair is pushed by a slope of beta / 2 on either error, twice that of Diffusion-DPO at a margin of 0.

    Args:
        beta: strength of the preference in logits per unit of error, as beta_dpo of the Diffusion-DPO code.
        limit: margin in logits at which a pair is left alone; null: never.
        sft_weight: weight of the chosen image's own denoising error; 0 turns the term off.
        anchor_weight: weight of the squared distance to the reference's prediction on clean prompts; 0 is off.

    Raises:
        ValueError: if ``limit`` is not above 0.
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
