"""RePO (Peng et al., arXiv 2410.19933), adapted: DPO plus a rectified penalty on every harmful image of a pair.

The original is on-policy and keeps each prompt's cost below 0, not only the mean cost. Here the images of the pair
replace the policy's own images, and an image that violates the constraint (its cost is above the limit) is pushed away,
whether it is chosen or rejected. `ConstrainedDPO` with `constraint: rectified` is the on-policy form.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lit_safety.objectives.dpo import dpo_loss
from lit_safety.objectives.objective import Objective, ObjectiveOutput, PairErrors, PairLabels, implicit_rewards


def repo_penalty(reward_chosen: Tensor, reward_rejected: Tensor, cost: Tensor, limit: float = 0.0) -> Tensor:
    """Sum over both images of max(0, C - limit) softplus(reward): rewards (B,), costs (B, 2) -> (B,).

    ``reward`` is the implicit reward -(beta / 2)(e - r), which falls as the policy's error on the image rises. The
    force on a harmful image becomes small when the policy is far from it, so the penalty does not drive errors to
    infinity.
    """
    violation = (cost - limit).relu()
    return violation[:, 0] * F.softplus(reward_chosen) + violation[:, 1] * F.softplus(reward_rejected)


class RePO(Objective):
    """Rectified policy optimisation, off-policy: DPO whose harmful images, chosen or rejected, are pushed away.

    An unknown cost is refused and never counts as harmless. Pairs may be ordered by quality, safety or both: if the
    order already contains the cost, the penalty pushes the same image a second time, which is no contradiction.

    Args:
        beta: strength of the preference in logits per unit of error, as beta_dpo of the Diffusion-DPO code.
        penalty_weight: weight of the penalty per unit of cost above the limit; 0 is Diffusion-DPO.
        sft_weight: weight of the chosen image's own denoising error; 0 turns the term off.
        anchor_weight: weight of the squared distance to the reference's prediction on clean prompts; 0 is off.
        limit: the highest allowed cost of an image.

    Raises:
        ValueError: ``penalty_weight`` is negative, or ``limit`` is not a finite number.
    """

    opt_out = "penalty_weight: 0"

    def __init__(
        self,
        beta: float = 5000.0,
        penalty_weight: float = 1.0,
        sft_weight: float = 0.0,
        anchor_weight: float = 0.0,
        limit: float = 0.0,
    ) -> None:
        super().__init__(beta, sft_weight, anchor_weight)
        if not 0 <= penalty_weight < float("inf"):  # nan compares as false
            raise ValueError(f"penalty_weight must not be negative, got {penalty_weight}")
        if not -float("inf") < limit < float("inf"):
            raise ValueError(f"limit must be a finite number, got {limit}")
        self.penalty_weight = penalty_weight
        self.limit = limit

    @property
    def needs_cost(self) -> bool:  # type: ignore[override]
        return self.penalty_weight > 0

    def preference(self, m: Tensor, labels: PairLabels) -> Tensor:
        return dpo_loss(m)

    def __call__(self, errors: PairErrors, labels: PairLabels) -> ObjectiveOutput:
        output = super().__call__(errors, labels)
        if self.penalty_weight > 0:
            chosen, rejected = implicit_rewards(errors, self.beta)
            penalty = repo_penalty(chosen, rejected, labels.cost, self.limit)
            output.loss = output.loss + self.penalty_weight * penalty
            output.logs["loss/penalty"] = penalty.detach()
        return output
