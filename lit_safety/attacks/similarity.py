"""What a suffix search maximises: how like a goal the model takes a suffixed prompt to be."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lit_safety.attacks.network import Network
    from lit_safety.attacks.target import Target
    from lit_safety.backbones import Conditioning
    from lit_safety.evaluation.prompts import Prompt

Likeness = Callable[["Conditioning", Tensor], Tensor]
"""Text encoders' outputs for N suffixed prompts, and their numbers (N,) -> similarities (N,), with gradients."""


class Similarity(ABC):
    """A goal for every attacked prompt, and how near a text comes to it."""

    text_only: ClassVar[bool] = False
    """Whether it needs the text encoder alone: then what is found is the same for all arms of one pipeline."""
    knows: ClassVar[str]
    """What it takes to compute it."""
    settings: dict[str, Any]

    def check(self, attacked: Sequence[Prompt]) -> None:  # noqa: B027 (nothing to check)
        """Complain about what can be seen before anything is loaded.

        Raises:
            UserError: a file is missing or lacks what is needed.
        """

    @abstractmethod
    def likeness(self, target: Target, network: Network, prompts: Sequence[str]) -> Likeness:
        """How like their goals the suffixed prompts are.

        Args:
            target: the arm.
            network: its networks.
            prompts: the attacked prompts' texts, without suffix.
        """


def text_rows(network: Network, prompts: Sequence[str], batch_size: int = 64) -> Conditioning:
    """The text encoders' outputs for any number of prompts, without gradients."""
    parts = []
    with torch.no_grad():
        for start in range(0, len(prompts), batch_size):
            parts.append(network.backbone.encode_text(prompts[start : start + batch_size]))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
