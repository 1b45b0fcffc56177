"""What an objective sees of a batch of pairs, and the margin that most objectives are made of.

Source: Diffusion-DPO, Wallace et al., arXiv 2311.12908, equation 14 and the authors' code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class PairErrors:
    """Denoising errors of one batch of pairs, fp32, each of shape (B,).

    Chosen and rejected of a pair share timestep and noise. ``drift`` is the mean squared difference between the
    policy's and the reference's prediction on the chosen image; it is None unless the objective declares
    ``needs_drift``, because a cached reference stores errors and not predictions. ``overlap`` is the mean over C, H, W
    of residual_w * residual_l, the policy's prediction minus its target on either image, without gradient; it is None
    unless the objective declares ``needs_overlap``.
    """

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    drift: Tensor | None = None
    overlap: Tensor | None = None


@dataclass
class PairLabels:
    """What is known of the pairs of a batch apart from the model's errors.

    ``clean`` (B,) is 1 for a clean prompt and 0 for a harmful one. ``harmful`` (B, 2: 1 harmful, 0 safe),
    ``cost`` (B, 2: above 0 means harmful) and ``score`` (B, 2: quality, higher is better) hold chosen and rejected in
    their columns; nan means unknown. An objective that cannot do without one of them declares it (``needs_cost`` and
    the like), and its module refuses pairs that lack it before they get here.
    """

    clean: Tensor
    harmful: Tensor
    cost: Tensor
    score: Tensor


def prediction_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over all but the first dimension of (prediction - target)^2, reduced in fp32: (B, ...) -> (B,)."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def residual_overlap(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean of residual_w * residual_l of each pair, in fp32: two (2B, ...), chosen then rejected -> (B,).

    The gradients of the two errors with respect to the predictions are g = 2 residual / N, so with N elements
    g_w . g_l = 4 / N * overlap and |g_w|^2 = 4 / N * e_w. No gradient flows through it.
    """
    with torch.no_grad():
        chosen, rejected = (prediction.float() - target.float()).flatten(1).chunk(2)
        return (chosen * rejected).mean(1)


def delta(errors: PairErrors) -> Tensor:
    """Delta = (e_w - e_l) - (r_w - r_l), shape (B,); below 0 when the policy moved towards the chosen image.

    It is summed as (e_w - r_w) - (e_l - r_l), the same number, because at initialisation policy and reference
    are equal and each bracket is then exactly 0.
    """
    chosen = errors.policy_chosen - errors.reference_chosen
    rejected = errors.policy_rejected - errors.reference_rejected
    return chosen - rejected


def margin(errors: PairErrors, beta: float) -> Tensor:
    """m = -(beta / 2) Delta, shape (B,), in logits (arXiv 2311.12908, equation 14).

    ``beta`` is beta_dpo of the Diffusion-DPO code (5000 there); the factor 1/2 is applied here. The diffusers
    research script folds the 1/2 into its own value and says 2500 for the same thing. The timestep weight and the
    number of latent elements are folded into beta because errors are means.
    """
    return delta(errors) * (-0.5 * beta)


def implicit_rewards(errors: PairErrors, beta: float) -> tuple[Tensor, Tensor]:
    """Implicit rewards -(beta / 2)(e_w - r_w) and -(beta / 2)(e_l - r_l), each (B,), in logits."""
    chosen = (errors.policy_chosen - errors.reference_chosen) * (-0.5 * beta)
    rejected = (errors.policy_rejected - errors.reference_rejected) * (-0.5 * beta)
    return chosen, rejected
