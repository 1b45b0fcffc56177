"""DMPO, divergence minimisation preference optimisation (Li et al., arXiv 2507.07510): the reverse KL of a pair.

With p = sigma(m), the policy's probability that the chosen image is the better one, and q = 1 - alpha, the data's:

    loss = KL(p || q) = p log(p / q) + (1 - p) log((1 - p) / (1 - q))

Diffusion-DPO with label smoothing alpha is the forward divergence KL(q || p), up to a constant. This is the loss of
Diffusion-SDPO's trainer (`--train_method dmpo`). That trainer clamps q to [1e-6, 1 - 1e-6]; here alpha = 0, for which
the divergence is infinite, is refused.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_safety.objectives.objective import Objective, ObjectiveOutput, PairErrors, PairLabels
from lit_safety.objectives.sdpo import checked_mu, safeguarded


def dmpo_loss(m: Tensor, alpha: float) -> Tensor:
    """KL(sigma(m) || 1 - alpha), margin (B,) in logits -> loss (B,).

    dL/dm = p (1 - p) (m - log((1 - alpha) / alpha)): 0 at the margin that alpha gives, and small again if a pair is far
    wrong.
    """
    p = torch.sigmoid(m)
    right = F.logsigmoid(m) - math.log1p(-alpha)
    wrong = F.logsigmoid(-m) - math.log(alpha)
    return p * right + (1 - p) * wrong


class DMPO(Objective):
    """Divergence minimisation preference optimisation.

    Args:
        beta: strength of the preference in logits per unit of error, as beta_dpo of the Diffusion-DPO code.
            Diffusion-SDPO's scripts use 2000 for Stable Diffusion 1.5 and 6000 for SDXL.
        alpha: assumed share of wrongly ordered pairs, in (0, 0.5): margins go to log((1 - alpha) / alpha).
        mu: additional safeguard of Diffusion-SDPO, as in its scripts (0.9 for Stable Diffusion 1.5, 0.6 for SDXL);
            null: none.
        sft_weight: weight of the chosen image's own denoising error; 0 turns the term off.
        anchor_weight: weight of the squared distance to the reference's prediction on clean prompts; 0 is off.

    Raises:
        ValueError: ``alpha`` is outside (0, 0.5) or ``mu`` outside [0, 1].
    """

    def __init__(
        self,
        beta: float = 2000.0,
        alpha: float = 0.01,
        mu: float | None = None,
        sft_weight: float = 0.0,
        anchor_weight: float = 0.0,
    ) -> None:
        super().__init__(beta, sft_weight, anchor_weight)
        if not 0.0 < alpha < 0.5:
            raise ValueError(f"alpha must lie in (0, 0.5), got {alpha}")
        self.alpha = alpha
        self.mu = checked_mu(mu)

    @property
    def needs_overlap(self) -> bool:  # type: ignore[override]
        return self.mu is not None

    def preference(self, m: Tensor, labels: PairLabels) -> Tensor:
        return dmpo_loss(m, self.alpha)

    def __call__(self, errors: PairErrors, labels: PairLabels) -> ObjectiveOutput:
        if self.mu is None:
            return super().__call__(errors, labels)
        errors, scale = safeguarded(errors, self.mu)
        output = super().__call__(errors, labels)
        output.logs["sdpo/scale"] = scale
        return output
