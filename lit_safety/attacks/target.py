"""The interface of an attack: a generator of stages, each with a budget and a way to draw one image for each prompt."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lit_safety.attacks.network import Network, open_network
from lit_safety.core.errors import UserError
from lit_safety.drawing.arms import Arm
from lit_safety.drawing.gallery import DrawingSettings
from lit_safety.drawing.pipelines import load_pipeline
from lit_safety.drawing.prompts import Prompt

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class Stage:
    """One point of a curve before it is drawn."""

    budget: float
    """The budget that the attacker has used, in the attack's unit."""
    prompts: list[Prompt]
    """One prompt for each attacked prompt, in the same order."""
    pipe: Any
    """The pipeline that draws them. The arm's guard and negative prompt stay on."""
    drawing: DrawingSettings
    """The settings for drawing."""
    label: str = ""
    """A description of the budget, if a number is not enough."""
    identity: dict[str, Any] = field(default_factory=dict)
    """JSON-able: what the pixels depend on in addition to the arm, the prompts and the settings for drawing."""
    apply: Callable[[Network], Any] | None = None
    """Applies the result (except prompts and drawing settings) to another arm's networks and returns their pipeline.

    None: there is nothing to apply, and any pipeline can draw the prompts.
    """


class Attack(ABC):
    """One way to make an arm draw harm.

    `settings` holds everything that changes the result. It is written into the report, and a change of it runs the
    attack again.
    """

    budget: ClassVar[str]
    """Unit of the budget, as the label of the curve's axis."""
    knows: str
    """What the attacker needs; begins with `black box` or `white box`."""
    cumulative: ClassVar[bool] = False
    """Whether the attacker keeps earlier successes.

    Then an attack is a success at a budget if any image up to it has harm, including the unattacked one. Else each
    budget counts separately.
    """
    origin: ClassVar[float | None] = 0.0
    """The budget that means no attack; None: there is no such point."""
    strongest: ClassVar[bool] = False
    """Whether several stages can have the same budget. Then the one with most harm counts, and each has a label."""
    changes_denoiser: ClassVar[bool] = False
    """Whether the attack changes the denoiser's weights; if not, its result can be tried on another arm."""
    shares_arms: bool = False
    """Whether the result for one arm is also used for the others, so that one process runs them all."""
    sources: Sequence[str] = ()
    """Other arms that the attack uses."""

    settings: dict[str, Any]

    def check(self, prompts: Sequence[Prompt], attacked: Sequence[Prompt]) -> None:  # noqa: B027 (nothing to check)
        """Refuse what can be seen to be wrong before anything is loaded; called once.

        Args:
            prompts: the whole prompt set.
            attacked: the prompts of the set that are attacked.

        Raises:
            UserError: a file is missing, or the prompt set lacks what the attack needs.
        """

    def refuses(self, target: Target) -> str | None:
        """The reason why the attack does not apply to an arm; None: it applies."""
        return None

    def take_shards(self, shards: str) -> None:
        """Take the attacker's images from these shards, if the attack uses images from shards."""
        if getattr(self, "shards", None) is not None:
            vars(self)["shards"] = shards
            self.settings["shards"] = shards

    @property
    @abstractmethod
    def points(self) -> int:
        """The largest number of stages, for the progress bar."""

    @abstractmethod
    def stages(self, target: Target) -> Iterator[Stage]:
        """The stages in order; each is drawn and judged before the next one is requested."""


def increasing(values: Sequence[int], name: str) -> list[int]:
    """The budgets as a list, after a check.

    Raises:
        UserError: there is none, or they do not increase from at least 1.
    """
    if not values or values[0] < 1 or any(b <= a for a, b in pairwise(values)):
        raise UserError(f"{name} {list(values)}: must be increasing whole numbers of at least 1")
    return list(values)


# An arm under attack, as it is given to an attack.


@dataclass
class Target:
    """One arm, the attacked prompts, and what else an attack can use."""

    name: str
    arm: Arm
    folder: Path
    """Its pipeline."""
    base: Path
    """The base's pipeline, which an attacker of published weights has too."""
    prompts: list[Prompt]
    """The attacked prompts."""
    everything: Sequence[Prompt]
    """The whole prompt set."""
    drawing: DrawingSettings
    seed: int
    """Seed of all random choices of an attack."""
    work: Path
    """Folder for what an attack makes, such as an adapter."""
    tell: Callable[[str], None] = lambda _: None
    """Shows a text about the progress between images."""
    notes: list[str] = field(default_factory=list)
    """Notes for the report about this attack on this arm."""
    other: Callable[[str], Target] | None = None
    """Returns another arm of the run by its name."""

    @cached_property
    def pipe(self) -> Any:
        """The arm's pipeline, loaded once; an attack that changes it must use `fresh`."""
        return self.fresh()

    def release(self) -> None:
        """Delete the pipeline, so that the arms' pipelines do not fill the memory."""
        self.__dict__.pop("pipe", None)

    def fresh(self, arm: Arm | None = None) -> Any:
        """A new pipeline of this arm (or of a changed one) that nothing else uses."""
        return load_pipeline(self.folder, arm or self.arm, str(self.drawing.device), self.drawing.precision)

    def network(self) -> Network:
        """The arm's networks in fp32, which nothing else uses, for attacks that train or need gradients."""
        return open_network(self.folder, self.arm, str(self.drawing.device), self.drawing.resolution)

    def public_network(self) -> Network:
        """The same for the arm's pipeline without its adapters, but with its published UNet, if it has one."""
        plain = Arm(unet=self.arm.unet, unet_partial=self.arm.unet_partial)
        return open_network(self.folder, plain, str(self.drawing.device), self.drawing.resolution)

    def base_network(self) -> Network:
        """The same for the base."""
        return open_network(self.base, Arm(), str(self.drawing.device), self.drawing.resolution)

    def stage(self, budget: float, **given: Any) -> Stage:
        """A stage that draws the attacked prompts with the unchanged arm, except for what is given."""
        given.setdefault("pipe", None)
        if given["pipe"] is None:
            given["pipe"] = self.pipe
        return Stage(budget, **{"prompts": self.prompts, "drawing": self.drawing, **given})

    def closed(self) -> str | None:
        """The reason why attacks with gradients through the denoiser do not apply to this arm; None: they apply."""
        if self.arm.user_adapter() is not None:
            return "it draws for users, which this attack does not support"
        return self.unknown()

    def unknown(self) -> str | None:
        """The reason why attacks that compute do not apply to this arm's pipeline; None: they apply."""
        from lit_safety.backbones.load import FAMILIES
        from lit_safety.backbones.pipeline_index import pipeline_class_name

        name = pipeline_class_name(str(self.folder))
        return None if name in FAMILIES else f"no backbone supports pipelines of class {name}"

    def text_closed(self) -> str | None:
        """The reason why attacks on CLIP's tokens do not apply to this arm's pipeline; None: they apply."""
        from lit_safety.backbones.pipeline_index import pipeline_class_name

        name = pipeline_class_name(str(self.folder))
        if name.startswith("StableDiffusion"):
            return self.unknown()
        return f"this attack changes CLIP's tokens, but its text encoder is not only CLIP ({name})"

    @property
    def exact(self) -> DrawingSettings:
        """The settings for drawing with `network`, which is always in fp32."""
        return replace(self.drawing, precision="float32")
