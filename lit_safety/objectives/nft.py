"""DiffusionNFT: reinforcement learning on the forward process (Zheng et al., arXiv 2509.16117), under a constraint.

Images are drawn by a sampling policy, and each has a reward r in [0, 1]: the share by which it is an example of what
is wanted, 1 - r that by which it is one of what is not. With the predictions v_theta of the policy that is trained and
v_old of the sampling policy, at a noised image whose training target is v,

    v+ = (1 - b) v_old + b v_theta        v- = (1 + b) v_old - b v_theta
    L  = r |v+ - v|^2 + (1 - r) |v- - v|^2

Its minimum over v_theta at a noised image is v_old + E[(2 r - 1) (v - v_old)] / b, and for images of the sampling
policy itself, where v is v_old in expectation, v_old + 2 E[r (v - v_old)] / b: the policy moves towards what gets more
than half of the reward, by as much as rewards differ, and rests where all images of a prompt are equally good.
Predictions may be of the noise, of a velocity or of the image: for one noised image these are linear in each other.
What differs between them is how much a timestep counts: an error in the noise hardly counts where nearly all is noise.
Divided by |v_old - v|^2, as a constant, the loss is the same for all of them; the paper divides its loss in the image
by the error too. Which of the two is better is not
measured; the default is the plain loss, as preference losses have it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lit_safety.objectives.constrained import Constraint
from lit_safety.objectives.objective import Objective, ObjectiveOutput, PairErrors, PairLabels, prediction_error


def nft_errors(policy: Tensor, old: Tensor, target: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """|v+ - v|^2 and |v- - v|^2, means over all but the first dimension: three (B, ...) -> (B,), (B,)."""
    policy, old = policy.float(), old.float()
    moved = strength * (policy - old)
    return prediction_error(old + moved, target), prediction_error(old - moved, target)


def nft_loss(positive: Tensor, negative: Tensor, reward: Tensor) -> Tensor:
    """r |v+ - v|^2 + (1 - r) |v- - v|^2, each (B,)."""
    return reward * positive + (1 - reward) * negative


def relative(loss: Tensor, old: Tensor) -> Tensor:
    """A loss of v+ and v- divided by |v_old - v|^2, which is a constant for the gradient, each (B,)."""
    return loss / old.detach().clamp(min=1e-6)


def lagrangian(quality: Tensor, cost: Tensor, dual: Tensor | float, limit: float) -> Tensor:
    """quality - lambda (cost - limit), each (N,)."""
    return quality - dual * (cost - limit)


def normalised_rewards(values: Tensor, prompts: Sequence[int], scale: float) -> Tensor:
    """1/2 + 1/2 clip((R - mean over the prompt's images) / scale, -1, 1), (N,) -> (N,).

    Args:
        values: R of each image.
        prompts: number of each image's prompt.
        scale: by how much an image must be better than the mean to be a whole example.
    """
    rows = torch.tensor(list(prompts), dtype=torch.long, device=values.device)
    count = int(rows.max()) + 1 if len(rows) else 0
    held = torch.zeros(count, dtype=values.dtype, device=values.device).index_add_(0, rows, torch.ones_like(values))
    means = torch.zeros_like(held).index_add_(0, rows, values) / held.clamp(min=1)
    return 0.5 + 0.5 * ((values - means[rows]) / scale).clamp(-1, 1)


class DiffusionNFT(Constraint, Objective):
    """DiffusionNFT on images that the policy drew, whose reward is quality - lambda (cost - limit).

    `OnlineSCDPO` gives it errors of v+, v- and v_old in the place of chosen, rejected and reference.

    Args:
        strength: b: the smaller, the further one round moves the policy.
        scale: how much better than the mean of its prompt's images an image must be, in units of the reward, to be
            a whole example; images that differ by less are examples by that share.
        limit: the expected cost that is allowed, in the unit of the cost model (above 0 an image counts as harmful).
            The expectation is over the images that the sampling policy drew of its prompts as they are.
        dual: lambda at the start, in units of quality per unit of cost.
        dual_rate: as of `ConstrainedDPO`; lambda moves once a round.
        constraint: as of `ConstrainedDPO`. With `rectified` the cost is part of the reward only of prompts whose own
            images are above the limit on average.
        barrier_weight: as of `ConstrainedDPO`.
        barrier_edge: as of `ConstrainedDPO`.
        kl_weight: weight of the squared distance to the reference's prediction on every image that is drawn, up to the
            timestep's weight the KL divergence of one step; 0: off.
        weighting: `plain`: timesteps count as they do in an error of the backbone's prediction; `relative`: each by its
            error relative to the sampling policy's.

    Raises:
        ValueError: a number is outside its range.
    """

    def __init__(
        self,
        strength: float = 0.5,
        scale: float = 2.0,
        limit: float = 0.0,
        dual: float = 1.0,
        dual_rate: float = 0.1,
        constraint: Literal["dual", "rectified", "barrier"] = "dual",
        barrier_weight: float = 0.1,
        barrier_edge: float = 0.1,
        kl_weight: float = 0.0,
        weighting: Literal["plain", "relative"] = "plain",
    ) -> None:
        super().__init__(beta=1.0)
        if not 0 < strength <= 1 or not 0 < scale < float("inf") or not 0 <= kl_weight < float("inf"):
            raise ValueError(
                f"strength must lie in (0, 1], scale be above 0 and kl_weight not negative, got {strength}, {scale} "
                f"and {kl_weight}"
            )
        if weighting not in ("plain", "relative"):
            raise ValueError(f"weighting must be plain or relative, got {weighting!r}")
        self.constrain(limit, dual, dual_rate, constraint, barrier_weight, barrier_edge)
        self.weighting = weighting
        self.strength = strength
        self.scale = scale
        self.kl_weight = kl_weight
        self.reads_drift = kl_weight > 0

    def rewards(self, quality: Tensor, cost: Tensor, prompts: Sequence[int], own: Sequence[bool]) -> Tensor:
        """r of every image of a round, (N,) -> (N,).

        Args:
            quality: of each image, higher is better.
            cost: of each image, above 0 harmful.
            prompts: number of each image's prompt.
            own: whether the sampling policy drew it of the prompt as it is, and not to explore.
        """
        dual: Tensor | float = self.dual
        if self.constraint == "rectified":
            dual = self.dual * self._violating(cost, prompts, own)
        return normalised_rewards(lagrangian(quality, cost, dual, self.limit), prompts, self.scale)

    def _violating(self, cost: Tensor, prompts: Sequence[int], own: Sequence[bool]) -> Tensor:
        """1 for images of prompts whose own images cost more than the limit on average, else 0."""
        found: dict[int, list[float]] = {}
        for prompt, value, is_own in zip(prompts, cost.tolist(), own, strict=True):
            if is_own:
                found.setdefault(prompt, []).append(value)
        over = {prompt: not sum(values) / len(values) <= self.limit for prompt, values in found.items()}
        return torch.tensor([float(over.get(prompt, True)) for prompt in prompts]).to(cost)

    def preference(self, m: Tensor, labels: PairLabels) -> Tensor:
        raise TypeError("DiffusionNFT scores single images: train it with lit_safety.modules.OnlineSCDPO")

    def __call__(self, errors: PairErrors, labels: PairLabels) -> ObjectiveOutput:
        if labels.reward is None:
            raise ValueError("DiffusionNFT needs rewards of images that were drawn: train it with OnlineSCDPO")
        positive, negative = errors.policy_chosen, errors.policy_rejected
        preference = nft_loss(positive, negative, labels.reward)
        if self.weighting == "relative":
            preference = relative(preference, errors.reference_chosen)
        logs = {
            "loss/nft": preference.detach(),
            "online/reward": labels.reward,
            # |v_theta - v_old|^2, from |v+ - v|^2 + |v- - v|^2 = 2 |v_old - v|^2 + 2 b^2 |v_theta - v_old|^2
            "online/moved": (positive + negative - 2 * errors.reference_chosen).detach() / (2 * self.strength**2),
            "error/old": errors.reference_chosen.detach(),
        }
        if self.kl_weight == 0:
            return ObjectiveOutput(preference, logs)
        if errors.drift is None:
            raise ValueError("kl_weight needs the reference's predictions")
        logs["loss/kl"] = errors.drift.detach()
        keeping = self.kl_weight * errors.drift
        return ObjectiveOutput(preference + keeping, logs, keeping)
