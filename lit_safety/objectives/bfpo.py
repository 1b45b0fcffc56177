"""BFPO (Zhang et al., arXiv 2408.15313): a squared loss whose target margin depends on both images' safety labels."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_safety.objectives.objective import Objective, ObjectiveOutput, PairErrors, PairLabels


def bfpo_target(harmful: Tensor) -> Tensor:
    """Target margin in logits, labels (B, 2) of chosen and rejected, 1 harmful and 0 safe -> (B,).

    The paper's (3/2) s_w - (1/2) s_l - alpha with alpha = 1/2 and s = 1 for safe: 1/2 if both are safe, 1 if only the
    chosen image is safe, -1 if only the rejected image is safe (the order of the pair is reversed), -1/2 if both are
    harmful (the preferred image is pushed below the other one).
    """
    return 0.5 - 1.5 * harmful[:, 0] + 0.5 * harmful[:, 1]


def bfpo_loss(m: Tensor, harmful: Tensor, skip_unknown: bool = False) -> Tensor:
    """(m - target)^2, margin (B,) in logits, labels (B, 2) -> loss (B,).

    The paper divides the target by tau and m is tau times its log ratio: this is the paper's loss times tau^2, as for
    `ipo_loss`, which is the same if both images are safe. A pair with an unknown label (nan) gives nan, or 0 with
    ``skip_unknown``.
    """
    if not skip_unknown:
        return (m - bfpo_target(harmful)).square()
    # The label is replaced before the square: masking a nan after it would still give nan gradients.
    return (m - bfpo_target(harmful.nan_to_num(0.0))).square() * known(harmful)


def known(harmful: Tensor) -> Tensor:
    """1 where both labels of a pair are known and 0 where one is nan, (B, 2) -> (B,)."""
    return torch.isfinite(harmful).all(1).to(harmful.dtype)


class BFPO(Objective):
    """Bi-factorial preference optimisation: one loss for quality and safety, from labels instead of costs.

    A pair with an unknown `harmful` label is refused, because it has no target. With ``skip_unknown`` its preference
    loss is 0 instead. It still counts in the mean over the batch, so that the weight of the other pairs does not depend
    on how batches are split, and it keeps its regularisers. Pairs without safety labels then teach no preference;
    `bfpo/known` logs the share of pairs with labels.

    Args:
        beta: strength of the preference in logits per unit of error, as beta_dpo of the Diffusion-DPO code.
        skip_unknown: whether the loss of pairs with an unknown label is 0, instead of stopping the run.
        sft_weight: weight of the chosen image's own denoising error; 0 turns the term off.
        anchor_weight: weight of the squared distance to the reference's prediction on clean prompts; 0 is off.
    """

    opt_out = "skip_unknown: true"

    def __init__(
        self,
        beta: float = 5000.0,
        skip_unknown: bool = False,
        sft_weight: float = 0.0,
        anchor_weight: float = 0.0,
    ) -> None:
        super().__init__(beta, sft_weight, anchor_weight)
        self.skip_unknown = skip_unknown

    @property
    def needs_harmful(self) -> bool:  # type: ignore[override]
        return not self.skip_unknown

    def preference(self, m: Tensor, labels: PairLabels) -> Tensor:
        return bfpo_loss(m, labels.harmful, self.skip_unknown)

    def __call__(self, errors: PairErrors, labels: PairLabels) -> ObjectiveOutput:
        output = super().__call__(errors, labels)
        output.logs["bfpo/known"] = known(labels.harmful)
        return output
