"""The interface of an attack: a generator of stages, each a budget and what draws one image for each prompt."""

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
    """JSON-able: what the pixels depend on besides the arm, the prompts and the settings of the drawing."""
    apply: Callable[[Network], Any] | None = None
    """Puts what was found, besides prompts and drawing, on another arm's networks, and gives what draws with them;
    None: there is nothing, any pipeline draws the prompts."""


class Attack(ABC):
    """One way of getting harm out of an arm.

    `settings` holds whatever changes the result; it stands in the report and decides what is done again.
    """

    budget: ClassVar[str]
    """Unit of the budget, as the curve's axis says it."""
    knows: str
    """What the attacker needs, beginning with `black box` or `white box`."""
    cumulative: ClassVar[bool] = False
    """Whether the attacker keeps what worked earlier: success at a budget is then harm in any image up to it, the
    unattacked one included. Else each budget stands for itself."""
    origin: ClassVar[float | None] = 0.0
    """The budget at which the arm is not attacked; None: there is no such point."""
    strongest: ClassVar[bool] = False
    """Whether several stages may have one budget, of which the one with most harm counts; each then has a label."""
    changes_denoiser: ClassVar[bool] = False
    """Whether what is found lies in the weights of the denoiser; else another arm can be tried with it."""
    shares_arms: bool = False
    """Whether what is found for one arm serves the others, so that one process does them all."""
    sources: Sequence[str] = ()
    """Arms other than the attacked one that are used."""

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

    def take_shards(self, shards: str) -> None:
        """Take the attacker's images out of these shards, where the attack takes any out of some."""
        if getattr(self, "shards", None) is not None:
            vars(self)["shards"] = shards
            self.settings["shards"] = shards

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


# An arm under attack: what an attack is given.


@dataclass
class Target:
    """One arm, the prompts it is attacked with, and what else an attack may use."""

    name: str
    arm: Arm
    folder: Path
    """Its pipeline."""
    base: Path
    """The pipeline of the base, which an attacker of published weights has too."""
    prompts: list[Prompt]
    """Those that are attacked."""
    everything: Sequence[Prompt]
    """The whole prompt set."""
    drawing: DrawingSettings
    seed: int
    """Of every random choice of an attack."""
    work: Path
    """Where an attack keeps what it makes, such as an adapter."""
    tell: Callable[[str], None] = lambda _: None
    """Shows what is going on between images."""
    notes: list[str] = field(default_factory=list)
    """What the report must say of this attack on this arm."""
    other: Callable[[str], Target] | None = None
    """Another arm of the run by its name."""

    @cached_property
    def pipe(self) -> Any:
        """The arm's pipeline, loaded once; an attack that changes it takes `fresh`."""
        return self.fresh()

    def release(self) -> None:
        """Forget the pipeline, so that arms do not fill the memory together."""
        self.__dict__.pop("pipe", None)

    def fresh(self, arm: Arm | None = None) -> Any:
        """A pipeline of this arm (or of a changed one) that nobody else uses."""
        return load_pipeline(self.folder, arm or self.arm, str(self.drawing.device), self.drawing.precision)

    def network(self) -> Network:
        """The arm's networks in fp32, used by nothing else, for attacks that train or differentiate."""
        return open_network(self.folder, self.arm, str(self.drawing.device), self.drawing.resolution)

    def public_network(self) -> Network:
        """The same of the arm's pipeline, a UNet that was published for it included, without its adapters."""
        plain = Arm(unet=self.arm.unet, unet_partial=self.arm.unet_partial)
        return open_network(self.folder, plain, str(self.drawing.device), self.drawing.resolution)

    def base_network(self) -> Network:
        """The same of the base."""
        return open_network(self.base, Arm(), str(self.drawing.device), self.drawing.resolution)

    def stage(self, budget: float, **given: Any) -> Stage:
        """A stage that draws the attacked prompts with the arm as it is, but for what is given."""
        given.setdefault("pipe", None)
        if given["pipe"] is None:
            given["pipe"] = self.pipe
        return Stage(budget, **{"prompts": self.prompts, "drawing": self.drawing, **given})

    def closed(self) -> str | None:
        """Why attacks with gradients through the denoiser do not apply to this arm; None: they do."""
        if self.arm.user_adapter() is not None:
            return "it draws for users, and this attack knows of none"
        return self.unknown()

    def unknown(self) -> str | None:
        """Why attacks that compute do not apply to this arm's pipeline; None: they do."""
        from lit_safety.backbones.load import FAMILIES
        from lit_safety.backbones.pipeline_index import pipeline_class_name

        name = pipeline_class_name(str(self.folder))
        return None if name in FAMILIES else f"no backbone knows pipelines of class {name}"

    def text_closed(self) -> str | None:
        """Why attacks on the tokens of CLIP do not apply to this arm's pipeline; None: they do."""
        from lit_safety.backbones.pipeline_index import pipeline_class_name

        name = pipeline_class_name(str(self.folder))
        if name.startswith("StableDiffusion"):
            return self.unknown()
        return f"its text encoder is no CLIP alone ({name}), whose tokens this attack changes"

    @property
    def exact(self) -> DrawingSettings:
        """How images are drawn with `network`, which is in fp32 whatever the others are drawn in."""
        return replace(self.drawing, precision="float32")
