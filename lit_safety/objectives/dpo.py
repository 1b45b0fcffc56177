"""Losses on the margin alone: Diffusion-DPO, IPO, the hinge, FocalPO and Linear-DPO."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_safety.objectives.objective import Objective, PairLabels

# Diffusion-DPO (Wallace et al., arXiv 2311.12908), with conservative label smoothing (arXiv 2305.18290 code).


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


# FocalPO (Liu et al., arXiv 2501.06645): weight on pairs that are already right, the opposite of SC-DPO's focusing.


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


# Linear-DPO (Li et al., arXiv 2605.21123): a linear utility of the margin instead of the sigmoid.
#
# The sigmoid's slope falls as a pair's margin grows, so correctly ordered pairs teach little, and with a high beta
# these are nearly all pairs. A linear utility has the same slope everywhere. It does not stop by itself: in the paper
# the reference follows the policy (`model.init_args.stability.reference_decay`), and margins are measured from it.


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
