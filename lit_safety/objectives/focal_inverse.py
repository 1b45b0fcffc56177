"""FocalPO (Liu et al., arXiv 2501.06645): weight on pairs that are already right, the opposite of SC-DPO's focusing."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_safety.objectives.objective import Objective, PairLabels


def focal_inverse_loss(m: Tensor, gamma: float, detach_focus: bool = True) -> Tensor:
    """p^gamma (-log p) with p = sigmoid(m): margin (B,) in logits -> loss (B,).

    With ``detach_focus`` the weight carries no gradient and |dL/dm| is p^gamma (1 - p). Without it, dL/dm is -p^gamma
    (1 - p) (1 + gamma log p): its sign changes where p < exp(-1 / gamma), so that pairs that are far wrong become
    worse. gamma = 0 gives exactly Diffusion-DPO's value.
    """
    log_p = F.logsigmoid(m)
    if gamma == 0.0:
        return -log_p
    focus = torch.exp(gamma * log_p)
    return (focus.detach() if detach_focus else focus) * -log_p


class FocalInverse(Objective):
    """FocalPO's weight p^gamma on DPO, for comparison with SC-DPO's (1 - p)^gamma under the same settings.

    The paper uses ``detach_focus: false``.

    Args:
        beta: strength of the preference in logits per unit of error, as beta_dpo of the Diffusion-DPO code.
        gamma: exponent of the weight p^gamma; 0 is Diffusion-DPO.
        detach_focus: whether the weight is a constant for the gradient.
        sft_weight: weight of the chosen image's own denoising error; 0 turns the term off.
        anchor_weight: weight of the squared distance to the reference's prediction on clean prompts; 0 is off.

    Raises:
        ValueError: ``gamma`` is negative, or too large for ``detach_focus: false``: from 1 / ln 2 = 1.44 on, training
            starts (at p = 1/2) in the wrong direction.
    """

    def __init__(
        self,
        beta: float = 5000.0,
        gamma: float = 1.0,
        detach_focus: bool = True,
        sft_weight: float = 0.0,
        anchor_weight: float = 0.0,
    ) -> None:
        super().__init__(beta, sft_weight, anchor_weight)
        if not 0 <= gamma < float("inf"):  # nan compares as false
            raise ValueError(f"gamma must not be negative, got {gamma}")
        if not detach_focus and gamma >= 1 / math.log(2):
            raise ValueError(
                f"gamma must be below 1.44 (1 / ln 2) if detach_focus is false, got {gamma}: an untrained pair would "
                "be pushed in the wrong direction"
            )
        self.gamma = gamma
        self.detach_focus = detach_focus

    def preference(self, m: Tensor, labels: PairLabels) -> Tensor:
        return focal_inverse_loss(m, self.gamma, self.detach_focus)
