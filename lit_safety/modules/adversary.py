"""An adversary inside the training step: it disturbs what a network reads, so that safety holds where it is attacked.

For a harmful pair it looks for a disturbance d, bounded, that lowers the policy's error on the rejected image; the pair
is then trained at d, against the reference on the clean text. (With the reference at d too, the margin would cancel.)
Pairs with a clean prompt are disturbed at random, so that the policy stays the reference around them too.
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
    """Bounded sign steps in one place of the network; a subclass says where.

    Everything is counted in standard deviations of what is disturbed, each pair's own, so that one setting fits any
    model. Which pairs are attacked, starts and noise follow from the pairs' seeds.

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
            raise ValueError("restarts above 1 need start above 0: all searches would be the same one")
        self.radius, self.steps, self.step, self.share = radius, steps, step, share
        self.noise, self.clean_share, self.start, self.restarts, self.grow = noise, clean_share, start, restarts, grow

    def scale(self, optimizer_steps: int) -> float:
        """How much of radius and step holds after so many optimizer steps."""
        return 1.0 if self.grow == 0 else min(1.0, (optimizer_steps + 1) / self.grow)

    def on(
        self, moved: Any, backbone: Backbone, prompts: Sequence[str], conditioning: Conditioning, rows: Sequence[int]
    ) -> AbstractContextManager[Conditioning]:
        """Within, the denoiser computes disturbed; gives the conditioning to use.

        Args:
            moved: what is found for the batch at hand (`Moved`).
            backbone: the model.
            prompts: of the rows.
            conditioning: of the rows, or of the rows twice over (chosen, then rejected).
            rows: which pairs of the batch they are.
        """
        raise NotImplementedError


def named(network: nn.Module, endings: Sequence[str]) -> dict[str, list[tuple[str, nn.Module]]]:
    """The layers of a network whose names end so, by ending."""
    layers = list(network.named_modules())
    return {
        ending: [(name, layer) for name, layer in layers if name == ending or name.endswith(f".{ending}")]
        for ending in endings
    }
