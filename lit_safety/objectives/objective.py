"""The inputs of an objective for a batch of pairs, and the margin that most objectives use.

Source: Diffusion-DPO, Wallace et al., arXiv 2311.12908, equation 14 and the authors' code.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class PairErrors:
    """Denoising errors of one batch of pairs, fp32, each of shape (B,).

    Chosen and rejected of a pair share timestep and noise. ``drift`` is the mean squared difference between the
    policy's and the reference's prediction on the chosen image; it is None unless the objective declares
    ``needs_drift``, because a cached reference stores errors and not predictions. ``overlap`` is the mean over C, H, W
    of residual_w * residual_l, the policy's prediction minus its target on either image, without gradient; it is None
    unless the objective declares ``needs_overlap``. ``groups`` holds the errors of all images if groups are read whole;
    chosen and rejected are then the best and the worst image.
    """

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    drift: Tensor | None = None
    overlap: Tensor | None = None
    groups: GroupErrors | None = None


@dataclass
class GroupErrors:
    """Errors of all images of B prompts, each (B, K), with the same timestep and noise; 0 for no image."""

    policy: Tensor
    reference: Tensor


@dataclass
class GroupLabels:
    """The labels of these images, each (B, K); `ranks`: 0 is the best, equal numbers are ties, -1 is no image."""

    ranks: Tensor
    harmful: Tensor
    cost: Tensor
    score: Tensor


@dataclass
class PairLabels:
    """The labels of a batch of pairs.

    ``clean`` (B,) is 1 for a clean prompt and 0 for a harmful one. ``harmful`` (B, 2: 1 harmful, 0 safe),
    ``cost`` (B, 2: above 0 means harmful) and ``score`` (B, 2: quality, higher is better) hold chosen and rejected in
    their columns; nan means unknown. An objective that needs one of them declares it (``needs_cost`` and similar), and
    its module refuses pairs without it before they get here. ``reward`` (B,), in [0, 1], is given for single images
    that a policy drew: 1/2 for an image as good as the others of its prompt.
    """

    clean: Tensor
    harmful: Tensor
    cost: Tensor
    score: Tensor
    groups: GroupLabels | None = None
    reward: Tensor | None = None


def prediction_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over all but the first dimension of (prediction - target)^2, reduced in fp32: (B, ...) -> (B,)."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def masked(mask: Tensor, *latents: Tensor) -> tuple[Tensor, ...]:
    """Predictions and targets (2B, ..., h, w), scaled so that their mean squared difference counts only the mask.

    The mean of (w / mean(w)) d^2 over all positions is sum(w d^2) / sum(w), so both are multiplied by sqrt(w /
    mean(w)).

    Args:
        mask: (B, H, W) in [0, 1], in pixels; a latent's weight w is the mean over its pixels.
        latents: tensors of 2B rows: chosen, then rejected.
    """
    first = latents[0]
    weights = F.adaptive_avg_pool2d(mask[:, None].float(), (first.shape[-2], first.shape[-1]))
    scale = (weights / weights.mean((2, 3), keepdim=True)).sqrt().repeat(2, 1, 1, 1)
    scale = scale.view(len(first), *[1] * (first.ndim - 3), *scale.shape[2:])
    return tuple(one.float() * scale for one in latents)


def residual_overlap(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean of residual_w * residual_l of each pair, in fp32: two (2B, ...), chosen then rejected -> (B,).

    The gradients of the two errors with respect to the predictions are g = 2 residual / N, so with N elements
    g_w . g_l = 4 / N * overlap and |g_w|^2 = 4 / N * e_w. No gradient flows through it.
    """
    with torch.no_grad():
        chosen, rejected = (prediction.float() - target.float()).flatten(1).chunk(2)
        return (chosen * rejected).mean(1)


def delta(errors: PairErrors) -> Tensor:
    """Delta = (e_w - e_l) - (r_w - r_l), shape (B,); it is below 0 if the policy moved towards the chosen image.

    It is summed as (e_w - r_w) - (e_l - r_l), the same number, because at initialisation policy and reference
    are equal and each bracket is then exactly 0.
    """
    chosen = errors.policy_chosen - errors.reference_chosen
    rejected = errors.policy_rejected - errors.reference_rejected
    return chosen - rejected


def margin(errors: PairErrors, beta: float) -> Tensor:
    """m = -(beta / 2) Delta, shape (B,), in logits (arXiv 2311.12908, equation 14).

    ``beta`` is beta_dpo of the Diffusion-DPO code (5000 there); the factor 1/2 is applied here. The diffusers research
    script includes the 1/2 in its own value, 2500, for the same thing. The timestep weight and the number of latent
    elements are included in beta, because errors are means.
    """
    return delta(errors) * (-0.5 * beta)


def implicit_rewards(errors: PairErrors, beta: float) -> tuple[Tensor, Tensor]:
    """Implicit rewards -(beta / 2)(e_w - r_w) and -(beta / 2)(e_l - r_l), each (B,), in logits."""
    chosen = (errors.policy_chosen - errors.reference_chosen) * (-0.5 * beta)
    rejected = (errors.policy_rejected - errors.reference_rejected) * (-0.5 * beta)
    return chosen, rejected


# Terms that keep the image quality in preference training; each is an option of every objective.


def sft_loss(policy_chosen: Tensor) -> Tensor:
    """Supervised fine-tuning on the chosen image: the policy's own denoising error e_w, (B,) -> (B,).

    Preference losses depend only on differences of errors, so both errors may grow. This term keeps the chosen one low
    (the "RPO" term of Iterative RPO, Pang et al., arXiv 2404.19733, equation 1, in its diffusion form).
    """
    return policy_chosen


def anchor_loss(drift: Tensor, clean: Tensor) -> Tensor:
    """Squared distance of policy and reference predictions, on clean prompts only: (B,), (B,) -> (B,).

    For Gaussian denoisers the squared distance between predictions is, up to the timestep's weight, the KL
    divergence of one denoising step, so this is a direct KL penalty on prompts where the model was right from the
    start. Harmful prompts contribute 0 but count in the mean over the batch, so that the term's weight does not depend
    on how a batch is split into micro-batches.
    """
    return drift * clean


# The base class of objectives: a margin, a preference loss on it, and two regularisers.
#
# A new objective is one function and one subclass that calls it; YAML names the subclass by `class_path`.


@dataclass
class ObjectiveOutput:
    """``loss`` (B,), one number for each pair, and tensors of shape (B,) to log (their means are logged).

    ``keeping`` (B,) is the anchor term, including its weight: the part of the loss that keeps the policy close to the
    reference. None: there is no anchor term.
    """

    loss: Tensor
    logs: dict[str, Tensor] = field(default_factory=dict)
    keeping: Tensor | None = None


class Objective:
    """Preference loss plus regularisers.

    Override `preference` for another loss on the margin. A loss that needs more than the margin (a term on the errors,
    pairs in another order, a scaled branch) overrides `__call__`, changes the errors or labels, and calls this class's
    method.

    Args:
        beta: strength of the preference in logits per unit of error, as beta_dpo of the Diffusion-DPO code.
        sft_weight: weight of the chosen image's own denoising error; 0 turns the term off.
        anchor_weight: weight of the squared distance to the reference's prediction on clean prompts; 0 is off.

    Raises:
        ValueError: ``beta`` is not positive, or a weight is negative.
    """

    # The labels that a loss reads, as class attributes or properties. The module refuses a pair without a declared
    # label, by name and on the host, because a nan label would reach the loss unnoticed.

    #: The loss reads ``labels.cost``.
    needs_cost: bool = False
    #: The loss reads ``labels.score``.
    needs_score: bool = False
    #: The loss reads ``labels.harmful`` of both images.
    needs_harmful: bool = False
    #: The loss adds the cost to the pair's order, which must then not already contain the cost (order "composite").
    refuses_composite: bool = False
    #: The setting of this objective, as written in YAML, with which it needs no labels; None: there is none.
    opt_out: str | None = None
    #: ``PairErrors.overlap`` is needed.
    needs_overlap: bool = False
    #: The loss itself reads ``PairErrors.drift`` of every pair; a reference cache holds it only for clean prompts.
    reads_drift: bool = False
    #: Groups are read whole, so that ``PairErrors.groups`` and ``PairLabels.groups`` are given.
    needs_groups: bool = False
    #: The callback of `lit_safety.callbacks` that must update ``state_dict`` during training. A warning names it if no
    #: callback of a run declares by its ``moves`` that it does this. None: no update is needed.
    moved_by: str | None = None
    #: The sizes of margins are logged too; a callback that reads them sets this.
    tells_sizes: bool = False

    def __init__(self, beta: float = 5000.0, sft_weight: float = 0.0, anchor_weight: float = 0.0) -> None:
        kind = type(self)
        if all(getattr(kind, name) is getattr(Objective, name) for name in ("preference", "pair_loss", "__call__")):
            raise ValueError(
                f"{kind.__name__} has no loss: define `preference(self, m: Tensor, labels: PairLabels) -> Tensor`, or "
                "`pair_loss(self, errors, m, labels)` if it reads more than the margin"
            )
        if not 0 < beta < float("inf"):  # nan compares as false
            raise ValueError(f"beta must be above 0, got {beta}")
        if not (0 <= sft_weight < float("inf") and 0 <= anchor_weight < float("inf")):
            raise ValueError(f"sft_weight and anchor_weight must not be negative, got {sft_weight}, {anchor_weight}")
        self.beta = beta
        self.sft_weight = sft_weight
        self.anchor_weight = anchor_weight

    @property
    def needs_drift(self) -> bool:
        """Whether ``PairErrors.drift`` is needed, which a reference cache without predictions cannot give."""
        return self.anchor_weight > 0 or self.reads_drift

    def state_dict(self) -> dict[str, Any]:
        """What the objective learns during training, for the checkpoint; empty for most objectives."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore ``state``.

        Raises:
            ValueError: the state does not belong to this objective.
        """
        if state:
            found = ", ".join(sorted(state))
            raise ValueError(f"{type(self).__name__} has no state, but the checkpoint holds {found} of an objective")

    def preference(self, m: Tensor, labels: PairLabels) -> Tensor:
        """The preference loss of each pair: margin (B,) in logits -> loss (B,). Override this."""
        raise NotImplementedError

    def pair_loss(self, errors: PairErrors, m: Tensor, labels: PairLabels) -> Tensor:
        """The same for a loss that reads more than the margin: override this method instead of `preference`."""
        return self.preference(m, labels)

    def __call__(self, errors: PairErrors, labels: PairLabels) -> ObjectiveOutput:
        """Score a batch: errors and labels of B pairs -> losses (B,) and what to log."""
        m = margin(errors, self.beta)
        preference = self.pair_loss(errors, m, labels)
        loss = preference
        chosen, rejected = implicit_rewards(errors, self.beta)
        logs = {
            "loss/preference": preference.detach(),
            "rewards/chosen": chosen.detach(),
            "rewards/rejected": rejected.detach(),
            "rewards/margins": m.detach(),
            "rewards/accuracies": (m.detach() > 0).float(),
            "delta/chosen": (errors.policy_chosen - errors.reference_chosen).detach(),
            "delta/rejected": (errors.policy_rejected - errors.reference_rejected).detach(),
            "error/chosen": errors.policy_chosen.detach(),
        }
        if self.tells_sizes:
            logs["rewards/sizes"] = m.detach().abs()
            logs["rewards/undecided"] = torch.sigmoid(-logs["rewards/sizes"])  # DPO's gradient factor of ordered pairs
        if self.sft_weight > 0:
            sft = sft_loss(errors.policy_chosen)
            loss = loss + self.sft_weight * sft
            logs["loss/sft"] = sft.detach()
        keeping = None
        if self.anchor_weight > 0:
            if errors.drift is None:
                raise ValueError("anchor_weight needs the reference's predictions; a cached reference has none")
            anchor = anchor_loss(errors.drift, labels.clean)
            keeping = self.anchor_weight * anchor
            loss = loss + keeping
            logs["loss/anchor"] = anchor.detach()
        return ObjectiveOutput(loss=loss, logs=logs, keeping=keeping)
