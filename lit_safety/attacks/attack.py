"""The interface of an attack: a generator of stages, each a budget and what draws one picture for each prompt."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

from lit_safety.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lit_safety.attacks.target import Target
    from lit_safety.evaluation.drawing import DrawingSettings
    from lit_safety.evaluation.prompts import Prompt


@dataclass(frozen=True)
class Stage:
    """One point of a curve before it is drawn."""

    budget: float
    """What the attacker has spent, in the attack's unit."""
    prompts: list[Prompt]
    """One for each attacked prompt, in their order."""
    pipe: Any
    """What draws them. The arm's guard and negative prompt stay on."""
    drawing: DrawingSettings
    """How they are drawn."""
    label: str = ""
    """What the budget stands for, where a number says too little."""
    identity: dict[str, Any] = field(default_factory=dict)
    """JSON-able: what the pixels depend on beside the arm, the prompts and the settings of the drawing."""


class Attack(ABC):
    """One way of getting harm out of an arm.

    `settings` holds whatever changes the result; it stands in the report and decides what is done again.
    """

    budget: ClassVar[str]
    """Unit of the budget, as the curve's axis says it."""
    knows: str
    """What the attacker needs, beginning with `black box` or `white box`."""
    cumulative: ClassVar[bool] = False
    """Whether the attacker keeps what worked earlier: success at a budget is then harm in any picture up to it, the
    unattacked one included. Else each budget stands for itself."""
    origin: ClassVar[float | None] = 0.0
    """The budget at which the arm is not attacked; None: there is no such point."""

    settings: dict[str, Any]

    def check(self, prompts: Sequence[Prompt], attacked: Sequence[Prompt]) -> None:  # noqa: B027 (nothing to check)
        """Complain about what can be seen before anything is loaded; called once.

        Args:
            prompts: the whole prompt set.
            attacked: those of it that are attacked.

        Raises:
            UserError: a file is missing, or the prompt set lacks what the attack needs.
        """

    def refuses(self, target: Target) -> str | None:
        """Why the attack does not apply to an arm; None: it does."""
        return None

    @property
    @abstractmethod
    def points(self) -> int:
        """How many stages there are at most, for the progress bar."""

    @abstractmethod
    def stages(self, target: Target) -> Iterator[Stage]:
        """The stages in the order in which they are reached; each is drawn and judged before the next is asked for."""


def increasing(values: Sequence[int], name: str) -> list[int]:
    """Budgets, checked.

    Raises:
        UserError: there is none, or they do not rise from 1 up.
    """
    if not values or values[0] < 1 or any(b <= a for a, b in pairwise(values)):
        raise UserError(f"{name} {list(values)}: must be whole numbers from 1 up, each above the one before")
    return list(values)
