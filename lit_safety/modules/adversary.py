"""An adversary inside the training step: it disturbs the network's inputs, so that safety also holds under attack.

For a harmful pair it searches for a bounded disturbance d that lowers the policy's error on the rejected image. The
pair is then trained with d, against the reference on the undisturbed text. (If the reference were disturbed too, the
margin would cancel.) Pairs with a clean prompt get random noise, so that the policy stays close to the reference around
them too.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from lit_safety.modules.step_parts import Adversary

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from lit_safety.backbones.backbone import Backbone, Conditioning

KEY = "model.init_args.adversary"


class SignSteps(Adversary):
    """A search by bounded sign steps at one place of the network; a subclass says where.

    Every size is given in standard deviations of the disturbed values, measured for each pair, so that one setting fits
    any model. The pairs' seeds decide which pairs are attacked, where searches start, and the noise.

    Args:
        radius: bound of every number of a disturbance.
        steps: sign steps; each costs a forward and a backward pass of the attacked pairs' rejected images.
        step: length of one.
        share: probability with which a harmful pair is attacked.
        noise: standard deviation of the noise on pairs with a clean prompt, in units of the radius; 0: none.
        clean_share: probability with which such a pair gets noise.
        start: standard deviation of the noise that a search starts from; 0: it starts from nothing.
        restarts: searches, each from a start of its own; the one with the lowest error at its end counts.
        grow: optimizer steps over which radius and step grow from 0 to what is set; 0: they have it at once.

    Raises:
        ValueError: a number is outside its range.
    """

    def __init__(
        self,
        radius: float = 1.0,
        steps: int = 2,
        step: float = 0.6,
        share: float = 0.5,
        noise: float = 0.5,
        clean_share: float = 1.0,
        start: float = 0.0,
        restarts: int = 1,
        grow: int = 0,
    ) -> None:
        if not (0 < radius < float("inf") and 0 < step < float("inf")):  # nan compares as false
            raise ValueError(f"radius and step must be above 0, got {radius} and {step}")
        if not (0 <= share <= 1 and 0 <= clean_share <= 1):
            raise ValueError(f"share and clean_share must lie in [0, 1], got {share} and {clean_share}")
        if not (0 <= noise < float("inf") and 0 <= start < float("inf")) or grow < 0:
            raise ValueError(f"noise, start and grow must not be negative, got {noise}, {start} and {grow}")
        if steps < 1 or restarts < 1:
            raise ValueError(f"steps and restarts must be at least 1, got {steps} and {restarts}")
        if restarts > 1 and start == 0:
            raise ValueError("restarts above 1 need start above 0: otherwise all searches would be the same")
        self.radius, self.steps, self.step, self.share = radius, steps, step, share
        self.noise, self.clean_share, self.start, self.restarts, self.grow = noise, clean_share, start, restarts, grow

    def scale(self, optimizer_steps: int) -> float:
        """The factor for radius and step after this number of optimizer steps, in [0, 1]."""
        return 1.0 if self.grow == 0 else min(1.0, (optimizer_steps + 1) / self.grow)

    def on(
        self, moved: Any, backbone: Backbone, prompts: Sequence[str], conditioning: Conditioning, rows: Sequence[int]
    ) -> AbstractContextManager[Conditioning]:
        """A context in which the denoiser is disturbed; it yields the conditioning to use.

        Args:
            moved: the disturbance of the current batch (`Moved`).
            backbone: the model.
            prompts: the prompt of each row.
            conditioning: of the rows, or of the rows two times (chosen, then rejected).
            rows: the indices of these pairs in the batch.
        """
        raise NotImplementedError


def named(network: nn.Module, endings: Sequence[str]) -> dict[str, list[tuple[str, nn.Module]]]:
    """The layers of a network whose names end with one of the endings, grouped by ending."""
    layers = list(network.named_modules())
    return {
        ending: [(name, layer) for name, layer in layers if name == ending or name.endswith(f".{ending}")]
        for ending in endings
    }
