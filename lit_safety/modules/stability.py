"""Settings of what keeps a preference fit from running away, and the plain steps of a fit that sets none of it.

A preference loss sees the difference of two errors alone: the chosen image's may rise as long as the rejected one's
rises faster. At the published strengths that runs away on flow-matching transformers.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from lit_safety.core.chance import NOISE
from lit_safety.objectives.objective import ObjectiveOutput, PairErrors

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from lit_safety.data.reading.batch import PairBatch


@dataclass
class Stability:
    """Settings of a fit's stability; all off by default.

    **Guard.** A pair is over its limit where e_w > (1 + winner_limit) r_w, e_w being the policy's error on the chosen
    image and r_w its reference's. Its rejected image then has no gradient, so that to first order no pair pushes its
    own chosen image further, and its loss gets winner_weight (beta / 2) (e_w - (1 + winner_limit) r_w) on top: for a
    weight of 1 the steepest slope that Diffusion-DPO can have.

    **Moving reference.** The reference of training steps is a copy of what is trained, which follows it; validation,
    anchors and drawings keep the model as it was loaded.

    **Own noise** (PNAPO). x_t lies between an image and the very noise that it was drawn from, not between it and a
    fresh one: the straight line that a flow model has gone, or nearly.

    Args:
        winner_limit: share of its reference's error that a pair's chosen error may rise by; null: no guard.
        winner_weight: of what is above the limit, in units of beta / 2; 0: the rejected image's gradient is cut alone.
        reference_decay: the reference becomes decay reference + (1 - decay) policy; 0: it becomes the policy; null: it
            never moves.
        reference_every: optimizer steps between two such moves.
        own_noise: noise chosen and rejected image with what they were drawn from, of pairs that say it (`noise_seeds`).

    Raises:
        ValueError: a number is outside its range, or two settings contradict each other.
    """

    winner_limit: float | None = None
    winner_weight: float = 1.0
    reference_decay: float | None = None
    reference_every: int = 1
    own_noise: bool = False

    @property
    def plain(self) -> bool:
        """Whether nothing is set: `PlainSteps` do; else `SteadiedSteps`."""
        return self.winner_limit is None and self.reference_decay is None and not self.own_noise


class Stepping(Protocol):
    """What is asked of the module whose steps these are: `PreferenceModule`."""

    pretrained: str
    training: bool

    @property
    def device(self) -> torch.device: ...

    @property
    def global_step(self) -> int: ...

    @property
    def trainer(self) -> Trainer: ...

    def reference(self) -> AbstractContextManager[None]: ...

    def gaussian(self, batch: PairBatch, purpose: str, shape: tuple[int, ...]) -> Tensor: ...

    def trainable_parameters(self) -> list[tuple[str, torch.nn.Parameter]]: ...


class PlainSteps:
    """A step of a fit without any of these settings."""

    def of_pairs(self) -> list[str]:
        """Which of the settings act on pairs alone, and not on groups that are read whole."""
        return []

    def check(self, module: Stepping, datamodule: object) -> None:
        """Refuse data and strategies that the settings cannot be trained with, before a weight is loaded."""

    def spared(self, errors: PairErrors) -> PairErrors:
        """The errors that the objective gets."""
        return errors

    def guarded(self, errors: PairErrors, output: ObjectiveOutput, beta: float) -> ObjectiveOutput:
        """What the objective gave, with what is added to it."""
        return output

    def reference(self, module: Stepping) -> AbstractContextManager[None]:
        """Within, the denoiser is the reference that a step compares with."""
        return module.reference()

    def noise(self, module: Stepping, batch: PairBatch, shape: tuple[int, ...]) -> Tensor:
        """Noise of the images (2B, *shape), chosen, then rejected; the two of a pair share it."""
        return module.gaussian(batch, NOISE, shape).repeat(2, 1, 1, 1)

    def follow(self, module: Stepping) -> None:
        """The optimizer has stepped."""

    def state_dict(self) -> dict[str, Any]:
        """What the checkpoint keeps."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from it."""
