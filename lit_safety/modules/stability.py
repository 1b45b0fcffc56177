"""Settings that keep a preference fit from diverging, and the plain steps of a fit without these settings.

A preference loss depends only on the difference of two errors: the chosen image's error may rise as long as the
rejected one's rises faster. At the published strengths both errors grow without limit on flow-matching transformers.
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
    image and r_w its reference's. Its rejected image then gets no gradient, so that to first order no pair raises its
    own chosen error further. In addition winner_weight (beta / 2) (e_w - (1 + winner_limit) r_w) is added to its loss:
    with a weight of 1 this is the steepest slope that Diffusion-DPO can have.

    **Moving reference.** In training steps the reference is a copy of the trained weights that slowly follows them.
    Validation, anchors and drawings use the model as it was loaded.

    **Own noise** (PNAPO). x_t lies between an image and the noise from which it was drawn, instead of new noise: this
    is close to the straight line along which a flow model drew the image.

    Args:
        winner_limit: by which share of the reference's error a pair's chosen error may rise; null: no guard.
        winner_weight: weight of the error above the limit, in units of beta / 2; 0: only the rejected image's gradient
            is removed.
        reference_decay: the reference becomes decay x reference + (1 - decay) x policy; 0: it becomes the policy; null:
            it never changes.
        reference_every: optimizer steps between two such updates.
        own_noise: add to chosen and rejected image the noise from which they were drawn; pairs must give it
            (`noise_seeds`).

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
        """Whether nothing is set. Then `PlainSteps` is used, else `SteadiedSteps`."""
        return self.winner_limit is None and self.reference_decay is None and not self.own_noise


class Stepping(Protocol):
    """What these steps need from the module; `PreferenceModule` provides it."""

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
        """The settings that act only on pairs, and not on groups that are read whole."""
        return []

    def check(self, module: Stepping, datamodule: object) -> None:
        """Before weights are loaded, refuse data and strategies that do not work with the settings."""

    def spared(self, errors: PairErrors) -> PairErrors:
        """The errors that are given to the objective."""
        return errors

    def guarded(self, errors: PairErrors, output: ObjectiveOutput, beta: float) -> ObjectiveOutput:
        """The objective's output, plus what is added to it."""
        return output

    def reference(self, module: Stepping) -> AbstractContextManager[None]:
        """A context in which the denoiser is the reference of a training step."""
        return module.reference()

    def noise(self, module: Stepping, batch: PairBatch, shape: tuple[int, ...]) -> Tensor:
        """Noise of the images (2B, *shape), chosen, then rejected; the two of a pair share it."""
        return module.gaussian(batch, NOISE, shape).repeat(2, 1, 1, 1)

    def follow(self, module: Stepping) -> None:
        """Called after an optimizer step."""

    def state_dict(self) -> dict[str, Any]:
        """What the checkpoint keeps."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state."""
