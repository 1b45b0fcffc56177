"""Hinge loss on the margin (SLiC-HF, Zhao et al., arXiv 2305.10425; TRL's `hinge`)."""

from __future__ import annotations

from torch import Tensor

from lit_safety.objectives.objective import Objective
from lit_safety.objectives.pair import PairLabels


def hinge_loss(m: Tensor) -> Tensor:
    """max(0, 1 - m), margin (B,) in logits -> loss (B,); a pair with a margin of 1 or more has no gradient."""
    return (1.0 - m).relu()


class Hinge(Objective):
    """Hinge loss: pairs are pushed with the same force until their margin is one logit, then left alone.

    Args:
        beta: strength of the preference in logits per unit of error, as beta_dpo of the Diffusion-DPO code.
        sft_weight: weight of the chosen image's own denoising error; 0 turns the term off.
        anchor_weight: weight of the squared distance to the reference's prediction on clean prompts; 0 is off.
    """

    def preference(self, m: Tensor, labels: PairLabels) -> Tensor:
        return hinge_loss(m)
