"""Diffusion-SDPO (Fu et al., arXiv 2511.03317): DPO that scales the loser's gradient to protect the winner.

DPO can increase the margin by raising both errors, the loser's faster. To first order and in output space, the step
-(g_w - kappa g_l) lowers the winner's error as long as g_w . (g_w - kappa g_l) is positive, g being the gradients of
the two errors with respect to the predictions. The loser's share kappa is the largest in [0, 1] that keeps a fraction
mu of |g_w|^2.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lit_safety.objectives.dpo import dpo_loss
from lit_safety.objectives.objective import Objective, ObjectiveOutput, PairErrors, PairLabels


def loser_scale(error_chosen: Tensor, overlap: Tensor, mu: float) -> Tensor:
    """kappa = min(1, (1 - mu) |g_w|^2 / (g_w . g_l)) if g_w . g_l > 0, else 1: all (B,), without gradient.

    |g_w|^2 and g_w . g_l are e_w and the overlap of the residuals times the same 4 / N (see `residual_overlap`). Then
    g_w . (g_w - kappa g_l) >= mu |g_w|^2. It is computed for each pair, not once for a batch.
    """
    with torch.no_grad():
        bound = (1.0 - mu) * error_chosen / overlap.clamp_min(torch.finfo(overlap.dtype).tiny)
        return torch.where(overlap > 0, bound.clamp(max=1.0), 1.0)


def scale_gradient(x: Tensor, scale: Tensor) -> Tensor:
    """``x`` unchanged in value, its gradient multiplied by ``scale``: sg(x) + scale (x - sg(x))."""
    constant = x.detach()
    return constant + scale * (x - constant)


def safeguarded(errors: PairErrors, mu: float) -> tuple[PairErrors, Tensor]:
    """The errors, with the rejected one's gradient multiplied by kappa, and kappa (B,). Values do not change.

    Raises:
        ValueError: ``errors`` contains no overlap.
    """
    if errors.overlap is None:
        raise ValueError("Diffusion-SDPO's mu needs PairErrors.overlap; the module must check `needs_overlap`")
    scale = loser_scale(errors.policy_chosen, errors.overlap, mu)
    return replace(errors, policy_rejected=scale_gradient(errors.policy_rejected, scale)), scale


def checked_mu(mu: float | None) -> float | None:
    """``mu``, after a check of its range.

    Raises:
        ValueError: it is outside [0, 1].
    """
    if mu is not None and not 0.0 <= mu <= 1.0:
        raise ValueError(f"mu must lie in [0, 1], got {mu}")
    return mu


class DiffusionSDPO(Objective):
    """Diffusion-SDPO: DPO's value and margin, with a gradient that does not raise the chosen image's error.

    The guarantee holds for one pair's predictions. Because pairs share weights, an update can still raise the chosen
    error: watch `delta/chosen`. `sdpo/scale` logs kappa.

    Args:
        beta: strength of the preference in logits per unit of error, as beta_dpo of the Diffusion-DPO code.
        mu: share of the chosen image's own progress that must remain, in [0, 1]. 0 only prevents a rise of its error; 1
            ignores the rejected image wherever the gradients overlap. The authors' scripts use 0.9 for Stable Diffusion
            1.5 and 0.6 for SDXL.
        sft_weight: weight of the chosen image's own denoising error; 0 turns the term off.
        anchor_weight: weight of the squared distance to the reference's prediction on clean prompts; 0 is off.

    Raises:
        ValueError: ``mu`` is outside [0, 1].
    """

    needs_overlap = True

    def __init__(
        self, beta: float = 5000.0, mu: float = 0.9, sft_weight: float = 0.0, anchor_weight: float = 0.0
    ) -> None:
        super().__init__(beta, sft_weight, anchor_weight)
        checked_mu(mu)
        self.mu = mu

    def preference(self, m: Tensor, labels: PairLabels) -> Tensor:
        return dpo_loss(m)

    def __call__(self, errors: PairErrors, labels: PairLabels) -> ObjectiveOutput:
        errors, scale = safeguarded(errors, self.mu)
        output = super().__call__(errors, labels)
        output.logs["sdpo/scale"] = scale
        return output
