"""What an objective sees of a batch of pairs, and the margin that most objectives are made of.

Source: Diffusion-DPO, Wallace et al., arXiv 2311.12908, equation 14 and the authors' code.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class PairErrors:
    """Denoising errors of one batch of pairs, fp32, each of shape (B,).

    Chosen and rejected of a pair share timestep and noise. ``drift`` is the mean squared difference between the
    policy's and the reference's prediction on the chosen image; it is None unless the objective declares
    ``needs_drift``, because a cached reference stores errors and not predictions. ``overlap`` is the mean over C, H, W
    of residual_w * residual_l, the policy's prediction minus its target on either image, without gradient; it is None
    unless the objective declares ``needs_overlap``. ``groups`` holds the errors of all images where groups are read
    whole; chosen and rejected are then the best and the worst.
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
    """Errors of all images of B prompts, each (B, K), all at one timestep and noise; 0 where no image is."""

    policy: Tensor
    reference: Tensor


@dataclass
class GroupLabels:
    """What is known of these images, each (B, K); `ranks` 0 the best, equal where tied, -1 where no image is."""

    ranks: Tensor
    harmful: Tensor
    cost: Tensor
    score: Tensor


@dataclass
class PairLabels:
    """What is known of the pairs of a batch apart from the model's errors.

    ``clean`` (B,) is 1 for a clean prompt and 0 for a harmful one. ``harmful`` (B, 2: 1 harmful, 0 safe),
    ``cost`` (B, 2: above 0 means harmful) and ``score`` (B, 2: quality, higher is better) hold chosen and rejected in
    their columns; nan means unknown. An objective that cannot do without one of them declares it (``needs_cost`` and
    the like), and its module refuses pairs that lack it before they get here. ``reward`` (B,), in [0, 1], is there for
    single images that a policy drew, 1/2 where an image is as good as the others of its prompt.
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


# Terms that keep a preference-trained model drawing well; each is an option of every objective.


def sft_loss(policy_chosen: Tensor) -> Tensor:
    """Supervised fine-tuning on the chosen image: the policy's own denoising error e_w, (B,) -> (B,).

    Preference losses only see differences of errors and may let both errors grow; this term holds the chosen one
    down (the "RPO" term of Iterative RPO, Pang et al., arXiv 2404.19733, equation 1, in its diffusion form).
    """
    return policy_chosen


def anchor_loss(drift: Tensor, clean: Tensor) -> Tensor:
    """Squared distance of policy and reference predictions, on clean prompts only: (B,), (B,) -> (B,).

    For Gaussian denoisers the squared distance between predictions is, up to the timestep's weight, the KL
    divergence of one denoising step, so this is a direct KL penalty where the model was right to begin with.
    Harmful prompts contribute 0 and stay in the mean over the batch: the term's weight then does not depend on how
    a batch is split into micro-batches.
    """
    return drift * clean


# The base class of objectives: a margin, a preference loss on it, and two regularisers.
#
# A new objective is one function and one subclass that calls it; YAML names the subclass by `class_path`.


@dataclass
class ObjectiveOutput:
    """``loss`` (B,), one number a pair, and tensors of shape (B,) to log (their means are logged).

    ``keeping`` (B,) is the part of the loss, weight included, that holds the policy where it was: the anchor. None:
    there is none.
    """

    loss: Tensor
    logs: dict[str, Tensor] = field(default_factory=dict)
    keeping: Tensor | None = None


class Objective:
    """Preference loss plus regularisers.

    Override `preference` for another loss on the margin. What needs more than the margin (a term on the errors, pairs
    in another order, a scaled branch) overrides `__call__`, changes the errors or labels, and calls this class's.

    Args:
        beta: strength of the preference in logits per unit of error, as beta_dpo of the Diffusion-DPO code.
        sft_weight: weight of the chosen image's own denoising error; 0 turns the term off.
        anchor_weight: weight of the squared distance to the reference's prediction on clean prompts; 0 is off.

    Raises:
        ValueError: if ``beta`` is not positive or a weight is negative.
    """

    # What a loss reads of the labels, as class attributes or properties. The module refuses a pair that lacks what is
    # declared here, by name and on the host: nan in a label would reach the loss long before anybody looks.

    #: The loss reads ``labels.cost``.
    needs_cost: bool = False
    #: The loss reads ``labels.score``.
    needs_score: bool = False
    #: The loss reads ``labels.harmful`` of both images.
    needs_harmful: bool = False
    #: The loss adds the cost to the order of the pair, which must then not hold it already (order "composite").
    refuses_composite: bool = False
    #: The setting of this objective that does without what it needs, as it stands in YAML; None: there is none.
    opt_out: str | None = None
    #: ``PairErrors.overlap`` must be there.
    needs_overlap: bool = False
    #: The loss itself reads ``PairErrors.drift``, of every pair: a reference cache holds that of clean prompts alone.
    reads_drift: bool = False
    #: Groups are read whole, and ``PairErrors.groups`` and ``PairLabels.groups`` are there.
    needs_groups: bool = False
    #: The callback of `lit_safety.callbacks` to name where none of a run's declares, by its ``moves``, that it moves
    #: ``state_dict`` while the loss is trained; None: nothing needs to.
    moved_by: str | None = None
    #: How large the margins are is logged too; a callback that reads it sets this.
    tells_sizes: bool = False

    def __init__(self, beta: float = 5000.0, sft_weight: float = 0.0, anchor_weight: float = 0.0) -> None:
        kind = type(self)
        if all(getattr(kind, name) is getattr(Objective, name) for name in ("preference", "pair_loss", "__call__")):
            raise ValueError(
                f"{kind.__name__} has no loss: define `preference(self, m: Tensor, labels: PairLabels) -> Tensor`, or "
                "`pair_loss(self, errors, m, labels)` where it reads more than the margin"
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
        """Whether ``PairErrors.drift`` must be there (a reference cache cannot give it)."""
        return self.anchor_weight > 0 or self.reads_drift

    def state_dict(self) -> dict[str, Any]:
        """What the objective learns while it trains, for the checkpoint; nothing for most."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``.

        Raises:
            ValueError: if the state is not one of this objective's.
        """
        if state:
            found = ", ".join(sorted(state))
            raise ValueError(f"{type(self).__name__} has no state, but the checkpoint holds {found} of an objective")

    def preference(self, m: Tensor, labels: PairLabels) -> Tensor:
        """The preference loss of each pair: margin (B,) in logits -> loss (B,). Override this."""
        raise NotImplementedError

    def pair_loss(self, errors: PairErrors, m: Tensor, labels: PairLabels) -> Tensor:
        """The same for a loss that reads more than the margin: override this one instead of `preference`."""
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
            logs["rewards/undecided"] = torch.sigmoid(-logs["rewards/sizes"])  # scales DPO's gradient of pairs in order
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
