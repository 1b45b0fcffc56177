"""SC-DPO as reconstructed from the abstract of arXiv 2504.14290: a cost margin and dynamic focusing on DPO.

The authors published neither code nor weights, so we do not claim to reproduce their figures. The margin follows from
maximising E[r - lambda C] - beta KL, whose implicit reward is r - lambda C; on pairs ordered by safety it is an offset
in the sense of ODPO (arXiv 2402.10571). The focusing weight is that of the focal loss (arXiv 1708.02002).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_safety.objectives.objective import Objective, ObjectiveOutput, PairErrors, PairLabels


def cost_margin(m: Tensor, cost_chosen: Tensor, cost_rejected: Tensor, cost_weight: float) -> Tensor:
    """m_SC = m + lambda (C_w - C_l), all (B,). A chosen image that is much safer must reach a larger margin m."""
    if cost_weight == 0.0:
        return m
    return m + cost_weight * (cost_chosen - cost_rejected)


def scdpo_loss(m_sc: Tensor, gamma: float, dfm_detach: bool = True) -> Tensor:
    """(1 - p)^gamma (-log p) with p = sigmoid(m_SC): (B,) -> (B,).

    The weight is computed as exp(gamma log sigmoid(-m_SC)), because the plain power has nan gradients in fp32 for
    gamma < 1 once p rounds to 1. With ``dfm_detach`` the weight has no gradient and |dL/dm| is (1 - p)^(gamma + 1).
    Without it, |dL/dm| is largest near m_SC = -3 and falls again for pairs that are further wrong. gamma = 0 gives
    exactly Diffusion-DPO's value.
    """
    loss = -F.logsigmoid(m_sc)
    if gamma == 0.0:
        return loss
    focus = torch.exp(gamma * F.logsigmoid(-m_sc))
    return (focus.detach() if dfm_detach else focus) * loss


class SafetyConstrainedDPO(Objective):
    """SC-DPO's objective: DPO with a margin that depends on the cost, and a focus on pairs that are not yet learned.

    Args:
        beta: strength of the preference in logits per unit of error, as beta_dpo of the Diffusion-DPO code.
        cost_weight: lambda, logits of margin per unit of cost difference; 0 turns the margin off.
        gamma: exponent of the dynamic focusing weight (1 - p)^gamma; 0 turns focusing off.
        dfm_detach: whether the focusing weight is a constant for the gradient.
        cost_clip: costs are clipped to [-cost_clip, cost_clip] before their difference is taken; null: not clipped.
        sft_weight: weight of the chosen image's own denoising error; 0 turns the term off.
        anchor_weight: weight of the squared distance to the reference's prediction on clean prompts; 0 is off.

    Raises:
        ValueError: ``cost_weight`` or ``gamma`` is negative, or ``cost_clip`` is not positive.
    """

    def __init__(
        self,
        beta: float = 5000.0,
        cost_weight: float = 1.0,
        gamma: float = 1.0,
        dfm_detach: bool = True,
        cost_clip: float | None = None,
        sft_weight: float = 0.0,
        anchor_weight: float = 0.0,
    ) -> None:
        super().__init__(beta, sft_weight, anchor_weight)
        if not (0 <= cost_weight < float("inf") and 0 <= gamma < float("inf")):  # nan compares as false
            raise ValueError(f"cost_weight and gamma must not be negative, got {cost_weight}, {gamma}")
        if cost_clip is not None and not 0 < cost_clip < float("inf"):
            raise ValueError(f"cost_clip must be above 0 or null, got {cost_clip}")
        self.cost_weight = cost_weight
        self.gamma = gamma
        self.dfm_detach = dfm_detach
        self.cost_clip = cost_clip

    opt_out = "cost_weight: 0"

    @property
    def needs_cost(self) -> bool:  # type: ignore[override]
        return self.cost_weight > 0

    @property
    def refuses_composite(self) -> bool:  # type: ignore[override]
        return self.cost_weight > 0

    @contextmanager
    def without_cost(self) -> Iterator[None]:
        """A context in which ``cost_weight`` is 0 and no cost is read."""
        weight, self.cost_weight = self.cost_weight, 0.0
        try:
            yield
        finally:
            self.cost_weight = weight

    def _clipped(self, labels: PairLabels) -> Tensor:
        return labels.cost if self.cost_clip is None else labels.cost.clamp(-self.cost_clip, self.cost_clip)

    def __call__(self, errors: PairErrors, labels: PairLabels) -> ObjectiveOutput:
        output = super().__call__(errors, labels)
        if self.needs_cost and self.tells_sizes:
            cost = self._clipped(labels)
            output.logs["costs/gaps"] = cost[:, 1] - cost[:, 0]
        return output

    def preference(self, m: Tensor, labels: PairLabels) -> Tensor:
        cost = self._clipped(labels)
        m_sc = cost_margin(m, cost[:, 0], cost[:, 1], self.cost_weight)
        return scdpo_loss(m_sc, self.gamma, self.dfm_detach)
