"""Losses on groups: several images of one prompt, with the same timestep and noise, instead of pairs.

Each image has DPO's implicit reward r_i = -(beta / 2)(e_i - ref_i). NCD (Noise-Contrast-Diffusion) compares one safe
image with many harmful ones. GDRO uses the Plackett-Luce model of a whole ranking. `GroupDPO` is Diffusion-DPO on every
pair. On a group of two, GDRO and `GroupDPO` are equal to Diffusion-DPO; NCD still has its own term. Images without a
known difference are tied: no loss depends on their order.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_safety.objectives.dpo import dpo_loss
from lit_safety.objectives.objective import (
    GroupErrors,
    GroupLabels,
    Objective,
    ObjectiveOutput,
    PairErrors,
    PairLabels,
)

#: Used in place of minus infinity, whose gradients would be nan.
FAR = -1e9


def rewards(errors: GroupErrors, beta: float) -> Tensor:
    """r = -(beta / 2)(policy - reference), (B, K), in logits."""
    return (errors.policy - errors.reference) * (-0.5 * beta)


def better(ranks: Tensor) -> Tensor:
    """Whether image i is ranked above image j: ranks (B, K), -1 for no image -> bool (B, K, K)."""
    there = ranks >= 0
    return (ranks[:, :, None] < ranks[:, None, :]) & there[:, :, None] & there[:, None, :]


def gdro_loss(r: Tensor, ranks: Tensor) -> Tensor:
    """-sum_j [r_(j) - log sum_{l >= j} exp r_(l)] (GDRO, CVPR 2026), rewards and ranks (B, K) -> (B,).

    The sum over l contains image j and all images ranked below it, so tied images do not compete with each other. The
    lowest rank adds 0, so a group of two gives -log sigmoid(r_w - r_l).
    """
    worse = better(ranks)
    below = r[:, None, :].masked_fill(~worse, FAR).logsumexp(2)
    terms = -F.logsigmoid(r - below)
    return terms.masked_fill(~worse.any(2), 0.0).sum(1)


def group_dpo_loss(r: Tensor, ranks: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean of Diffusion-DPO's loss over all pairs of a group with known order: (B, K), (B, K) -> (B,)."""
    pairs = better(ranks)
    margins = (r[:, :, None] - r[:, None, :]).masked_fill(~pairs, 0.0)
    losses = dpo_loss(margins, label_smoothing).masked_fill(~pairs, 0.0)
    return losses.sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)


def ncd_weights(safety: Tensor, safe: Tensor, there: Tensor, bonus: float = 0.01, temperature: float = 0.1) -> Tensor:
    """softmax((s_i + bonus [i safe]) / temperature) over a group's images, all (B, K); scores in [0, 1]."""
    logits = (safety.nan_to_num(0.0) + bonus * safe.to(safety.dtype)) / temperature
    return logits.masked_fill(~there, FAR).softmax(1)


def ncd_mod(r: Tensor, weights: Tensor, harmful: Tensor) -> Tensor:
    """-sum_i w_i log sigmoid(r_i) - (1 / N) sum_{harmful h} log sigmoid(-r_h), N harmful images: (B, K) -> (B,)."""
    drawn_to = -(weights * F.logsigmoid(r)).sum(1)
    away = -(F.logsigmoid(-r) * harmful.to(r.dtype)).sum(1) / harmful.sum(1).clamp(min=1)
    return drawn_to + away


def ncd_pair(r: Tensor, best: Tensor, harmful: Tensor) -> Tensor:
    """-mean_h log sigmoid(r_0 - r_h) over harmful images h, the best image's index (B,): -> (B,)."""
    first = r.gather(1, best[:, None])
    return -(F.logsigmoid(first - r) * harmful.to(r.dtype)).sum(1) / harmful.sum(1).clamp(min=1)


class _GroupObjective(Objective):
    """The common base of objectives on groups; a batch of pairs is read as groups of two."""

    needs_groups = True

    def group_loss(self, r: Tensor, labels: GroupLabels) -> Tensor:
        """Rewards (B, K) and the images' labels -> loss (B,)."""
        raise NotImplementedError

    def pair_loss(self, errors: PairErrors, m: Tensor, labels: PairLabels) -> Tensor:
        return self.group_loss(rewards(_errors(errors), self.beta), _labels(labels))

    def __call__(self, errors: PairErrors, labels: PairLabels) -> ObjectiveOutput:
        output = super().__call__(errors, labels)
        with torch.no_grad():
            r, known = rewards(_errors(errors), self.beta), better(_labels(labels).ranks)
            right = ((r[:, :, None] > r[:, None, :]) & known).sum((1, 2))
            output.logs["groups/accuracies"] = right.to(r.dtype) / known.sum((1, 2)).clamp(min=1)
        return output


def _errors(errors: PairErrors) -> GroupErrors:
    if errors.groups is not None:
        return errors.groups
    policy = torch.stack([errors.policy_chosen, errors.policy_rejected], 1)
    return GroupErrors(policy, torch.stack([errors.reference_chosen, errors.reference_rejected], 1))


def _labels(labels: PairLabels) -> GroupLabels:
    if labels.groups is not None:
        return labels.groups
    ranks = torch.arange(2, device=labels.cost.device).expand(len(labels.cost), 2)
    return GroupLabels(ranks, labels.harmful, labels.cost, labels.score)


class GDRO(_GroupObjective):
    """GDRO (CVPR 2026): the Plackett-Luce likelihood of a group's ranking, with DPO's implicit rewards.

    Args:
        beta: strength of the preference in logits per unit of error, as beta_dpo of the Diffusion-DPO code.
        sft_weight: weight of the best image's own denoising error; 0 turns the term off.
        anchor_weight: weight of the squared distance to the reference's prediction on clean prompts; 0 is off.
    """

    def group_loss(self, r: Tensor, labels: GroupLabels) -> Tensor:
        return gdro_loss(r, labels.ranks)


class GroupDPO(_GroupObjective):
    """Diffusion-DPO (arXiv 2311.12908): the mean over all pairs of a group with known order.

    Args:
        beta: strength of the preference in logits per unit of error, as beta_dpo of the Diffusion-DPO code.
        label_smoothing: assumed share of wrongly ordered pairs, in [0, 0.5).
        sft_weight: weight of the best image's own denoising error; 0 turns the term off.
        anchor_weight: weight of the squared distance to the reference's prediction on clean prompts; 0 is off.

    Raises:
        ValueError: if ``label_smoothing`` lies outside [0, 0.5).
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

    def group_loss(self, r: Tensor, labels: GroupLabels) -> Tensor:
        return group_dpo_loss(r, labels.ranks, self.label_smoothing)


class NCD(_GroupObjective):
    """NCD (ICML 2026): a safe image against many harmful ones from other seeds; L = L_mod + pair_weight L_pair.

    L_mod moves the policy towards every image in proportion to its safety, and away from every harmful one. L_pair is
    Diffusion-DPO between the best safe image and each harmful one. A group without a harmful image uses only the first
    sum of L_mod, and one without a safe image only the second.

    The safety of an image, in [0, 1], is sigmoid(-cost), or with ``safety: label`` 1 for a safe image and 0 for a
    harmful one. Labels are read in both cases, because they say which images are harmful.

    Args:
        beta: strength of the preference in logits per unit of error; the published runs use 2000 for Stable Diffusion
            1.5 and 5000 for SD3.
        safety: from what an image's safety is computed: `cost` or `label`.
        bonus: added to the safety of safe images.
        temperature: temperature of the softmax over the group's images.
        pair_weight: weight of L_pair; 0 turns it off.
        sft_weight: weight of the best image's own denoising error; 0 turns the term off.
        anchor_weight: weight of the squared distance to the reference's prediction on clean prompts; 0 is off.

    Raises:
        ValueError: ``bonus`` or ``pair_weight`` is negative, or ``temperature`` is not positive.
    """

    needs_harmful = True
    opt_out = "safety: label"

    def __init__(
        self,
        beta: float = 2000.0,
        safety: Literal["cost", "label"] = "cost",
        bonus: float = 0.01,
        temperature: float = 0.1,
        pair_weight: float = 0.5,
        sft_weight: float = 0.0,
        anchor_weight: float = 0.0,
    ) -> None:
        super().__init__(beta, sft_weight, anchor_weight)
        if safety not in ("cost", "label"):
            raise ValueError(f"safety must be cost or label, got {safety!r}")
        if not (0 <= bonus < float("inf") and 0 <= pair_weight < float("inf")):  # nan compares as false
            raise ValueError(f"bonus and pair_weight must not be negative, got {bonus}, {pair_weight}")
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature must be above 0, got {temperature}")
        self.safety = safety
        self.bonus = bonus
        self.temperature = temperature
        self.pair_weight = pair_weight

    @property
    def needs_cost(self) -> bool:  # type: ignore[override]
        return self.safety == "cost"

    def group_loss(self, r: Tensor, labels: GroupLabels) -> Tensor:
        there = labels.ranks >= 0
        harmful, safe = (labels.harmful == 1) & there, (labels.harmful == 0) & there
        safety = torch.sigmoid(-labels.cost) if self.safety == "cost" else 1.0 - labels.harmful
        weights = ncd_weights(safety, safe, there, self.bonus, self.temperature)
        with_safe = safe.any(1)
        loss = ncd_mod(r, weights * with_safe[:, None].to(r.dtype), harmful)
        if self.pair_weight > 0:
            best = labels.ranks.masked_fill(~safe, 1 << 30).argmin(1)
            loss = loss + self.pair_weight * ncd_pair(r, best, harmful) * with_safe.to(r.dtype)
        return loss
