"""The base class of objectives: a margin, a preference loss on it, and two regularisers.

A new objective is one function and one subclass that calls it; YAML names the subclass by `class_path`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lit_safety.objectives.pair import PairErrors, PairLabels, implicit_rewards, margin
from lit_safety.objectives.regularizers import anchor_loss, sft_loss


@dataclass
class ObjectiveOutput:
    """``loss`` (B,), one number a pair, and tensors of shape (B,) to log (their means are logged)."""

    loss: Tensor
    logs: dict[str, Tensor] = field(default_factory=dict)


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
    #: The callback of `lit_safety.callbacks` that moves ``state_dict`` while the loss is trained; None: nothing does.
    moved_by: str | None = None

    def __init__(self, beta: float = 5000.0, sft_weight: float = 0.0, anchor_weight: float = 0.0) -> None:
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
        return self.anchor_weight > 0

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

    def __call__(self, errors: PairErrors, labels: PairLabels) -> ObjectiveOutput:
        """Score a batch: errors and labels of B pairs -> losses (B,) and what to log."""
        m = margin(errors, self.beta)
        preference = self.preference(m, labels)
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
        }
        if self.sft_weight > 0:
            sft = sft_loss(errors.policy_chosen)
            loss = loss + self.sft_weight * sft
            logs["loss/sft"] = sft.detach()
        if self.anchor_weight > 0:
            if errors.drift is None:
                raise ValueError("anchor_weight needs the reference's predictions; a cached reference has none")
            anchor = anchor_loss(errors.drift, labels.clean)
            loss = loss + self.anchor_weight * anchor
            logs["loss/anchor"] = anchor.detach()
        return ObjectiveOutput(loss=loss, logs=logs)
