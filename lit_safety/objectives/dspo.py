"""DSPO, direct score preference optimisation (Zhu et al., ICLR 2025, openreview.net/forum?id=DomBynQsqt).

The score of preferred images is the reference's score, moved in the direction of the policy's own change. For
predictions, with the target n, the predictions p and p_ref on the chosen image, and sigma(m) of Diffusion-DPO's margin
m:

    loss = mean over C, H, W of ((p - n) - beta (1 - sigma(m)) (p - p_ref))^2

This is the loss of the authors' trainer, and of Diffusion-SDPO's, for Stable Diffusion 1.5. For SDXL both compute
something else: the square of (1 - sigma(m)) (p - p_ref), or of 1 - sigma(m) alone while the batch's mean of
(p - p_ref)^2 is below 0.1. That version has no denoising term, and a pair's loss depends on the rest of its batch. It
is not implemented here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_safety.objectives.objective import Objective, ObjectiveOutput, PairErrors, PairLabels
from lit_safety.objectives.sdpo import checked_mu, safeguarded


def dspo_loss(error: Tensor, reference: Tensor, drift: Tensor, m: Tensor, beta: float) -> Tensor:
    """e_w - k (e_w - r_w + d) + k^2 d with k = beta sigmoid(-m): all (B,) -> (B,).

    It is the mean of ((p - n) - k (p - p_ref))^2 in terms of e_w, the mean of (p - n)^2, r_w, that of (p_ref - n)^2,
    and the drift d, that of (p - p_ref)^2: twice the mean of (p - n)(p - p_ref) is e_w - r_w + d.
    """
    k = beta * torch.sigmoid(-m)
    return error - k * (error - reference + drift) + k.square() * drift


class DSPO(Objective):
    """Direct score preference optimisation.

    Its beta is not a beta_dpo: it scales the step towards the preferred score. For an untrained policy the gradient is
    that of the chosen image's own error, times 1 - beta / 2. The rejected image has an effect only through sigma(m).

    Args:
        beta: scale of the margin and of the step, above 0 and below 2. The authors search 0.001, 0.01 and 0.05.
        mu: additional safeguard of Diffusion-SDPO, as in its trainer (there 0.2 for Stable Diffusion 1.5); null: none.
        sft_weight: weight of the chosen image's own denoising error; 0 turns the term off.
        anchor_weight: weight of the squared distance to the reference's prediction on clean prompts; 0 is off.

    Raises:
        ValueError: ``beta`` is not below 2 (an untrained pair would be pushed in the wrong direction), or ``mu`` is
            outside [0, 1].
    """

    reads_drift = True

    def __init__(
        self, beta: float = 0.001, mu: float | None = None, sft_weight: float = 0.0, anchor_weight: float = 0.0
    ) -> None:
        super().__init__(beta, sft_weight, anchor_weight)
        if beta >= 2:
            raise ValueError(
                f"beta must be below 2 for DSPO, got {beta}: an untrained pair would be pushed in the wrong direction "
                "(the authors search 0.001, 0.01 and 0.05)"
            )
        self.mu = checked_mu(mu)

    @property
    def needs_overlap(self) -> bool:  # type: ignore[override]
        return self.mu is not None

    def pair_loss(self, errors: PairErrors, m: Tensor, labels: PairLabels) -> Tensor:
        if errors.drift is None:
            raise ValueError("DSPO needs PairErrors.drift; the module must check `needs_drift`")
        return dspo_loss(errors.policy_chosen, errors.reference_chosen, errors.drift, m, self.beta)

    def __call__(self, errors: PairErrors, labels: PairLabels) -> ObjectiveOutput:
        if self.mu is None:
            return super().__call__(errors, labels)
        errors, scale = safeguarded(errors, self.mu)
        output = super().__call__(errors, labels)
        output.logs["sdpo/scale"] = scale
        return output
