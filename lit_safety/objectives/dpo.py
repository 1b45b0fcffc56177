"""Diffusion-DPO (Wallace et al., arXiv 2311.12908), with conservative label smoothing (arXiv 2305.18290 code)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lit_safety.objectives.objective import Objective, PairLabels


def dpo_loss(m: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - eps) log sigmoid(m) - eps log sigmoid(-m), margin (B,) -> loss (B,)."""
    if label_smoothing == 0.0:
        return -F.logsigmoid(m)
    return -(1.0 - label_smoothing) * F.logsigmoid(m) - label_smoothing * F.logsigmoid(-m)


class DiffusionDPO(Objective):
    """Diffusion-DPO, the objective of SafetyDPO's experts.

    Args:
        beta: strength of the preference in logits per unit of error, as beta_dpo of the Diffusion-DPO code.
        label_smoothing: assumed share of wrongly ordered pairs, in [0, 0.5).
        sft_weight: weight of the chosen image's own denoising error; 0 turns the term off.
        anchor_weight: weight of the squared distance to the reference's prediction on clean prompts; 0 is off.

    Raises:
        ValueError: ``label_smoothing`` is outside [0, 0.5).
    """

    def __init__(
        self,
        beta: float = 5000.0,
        label_smoothing: float = 0.0,
        sft_weight: float = 0.0,
        anchor_weight: float = 0.0,
    ) -> None:
        super().__init__(beta, sft_weight, anchor_weight)
        if not 0.0 <= label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must lie in [0, 0.5), got {label_smoothing}")
        self.label_smoothing = label_smoothing

    def preference(self, m: Tensor, labels: PairLabels) -> Tensor:
        return dpo_loss(m, self.label_smoothing)


# IPO (Azar et al., arXiv 2310.12036): a squared loss with a target for the margin, so that it cannot grow forever.


def ipo_loss(m: Tensor) -> Tensor:
    """(m - 1/2)^2, margin (B,) in logits -> loss (B,).

    The paper and TRL write (h - 1 / (2 tau))^2 with m = tau h, where h is the difference of log ratios without its
    factor. That is this loss divided by tau^2: the same minimum, another scale. In this form the scale of the loss does
    not change with beta, so one learning rate works for IPO and DPO (the gradient at m = 0 is -1 here and -1/2 for
    DPO).
    """
    return (m - 0.5).square()


class IPO(Objective):
    """Identity preference optimisation: every pair is pulled to a margin of half a logit, from above and below.

    Args:
        beta: strength of the preference in logits per unit of error, as beta_dpo of the Diffusion-DPO code.
        sft_weight: weight of the chosen image's own denoising error; 0 turns the term off.
        anchor_weight: weight of the squared distance to the reference's prediction on clean prompts; 0 is off.
    """

    def preference(self, m: Tensor, labels: PairLabels) -> Tensor:
        return ipo_loss(m)


# Hinge loss on the margin (SLiC-HF, Zhao et al., arXiv 2305.10425; TRL's `hinge`).


def hinge_loss(m: Tensor) -> Tensor:
    """max(0, 1 - m), margin (B,) in logits -> loss (B,); a pair with a margin of 1 or more has no gradient."""
    return (1.0 - m).relu()


class Hinge(Objective):
    """Hinge loss: pairs are pushed with constant force until their margin is one logit, and then not any more.

    Args:
        beta: strength of the preference in logits per unit of error, as beta_dpo of the Diffusion-DPO code.
        sft_weight: weight of the chosen image's own denoising error; 0 turns the term off.
        anchor_weight: weight of the squared distance to the reference's prediction on clean prompts; 0 is off.
    """

    def preference(self, m: Tensor, labels: PairLabels) -> Tensor:
        return hinge_loss(m)
