"""IPO (Azar et al., arXiv 2310.12036): a squared loss with a target for the margin, so that it cannot grow for ever."""

from __future__ import annotations

from torch import Tensor

from lit_safety.objectives.objective import Objective
from lit_safety.objectives.pair import PairLabels


def ipo_loss(m: Tensor) -> Tensor:
    """(m - 1/2)^2, margin (B,) in logits -> loss (B,).

    The paper and TRL write (h - 1 / (2 tau))^2 with m = tau h, where h is the difference of log ratios without its
    factor. That is this loss divided by tau^2: the same minimum, another scale. In this form the scale of the loss
    does not change with beta, so one learning rate serves IPO and DPO (the gradient at m = 0 is -1 here, -1/2 there).
    """
    return (m - 0.5).square()


class IPO(Objective):
    """Identity preference optimisation: every pair is pulled to a margin of half a logit, from either side.

    Args:
        beta: strength of the preference in logits per unit of error, as beta_dpo of the Diffusion-DPO code.
        sft_weight: weight of the chosen image's own denoising error; 0 turns the term off.
        anchor_weight: weight of the squared distance to the reference's prediction on clean prompts; 0 is off.
    """

    def preference(self, m: Tensor, labels: PairLabels) -> Tensor:
        return ipo_loss(m)
