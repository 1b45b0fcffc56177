"""An arm under attack: what an attack is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lit_safety.attacks.attack import Stage
from lit_safety.attacks.network import Network, open_network
from lit_safety.evaluation.arms import Arm
from lit_safety.evaluation.drawing import DrawingSettings
from lit_safety.evaluation.pipelines import load_pipeline
from lit_safety.evaluation.prompts import Prompt


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
    """Shows what is going on between pictures."""
    notes: list[str] = field(default_factory=list)
    """What the report must say of this attack on this arm."""

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
        """The arm's networks in fp32, nobody else's, for attacks that train or differentiate."""
        return open_network(self.folder, self.arm, str(self.drawing.device), self.drawing.resolution)

    def public_network(self) -> Network:
        """The same of the arm's pipeline without its adapters."""
        return open_network(self.folder, Arm(), str(self.drawing.device), self.drawing.resolution)

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

    @property
    def exact(self) -> DrawingSettings:
        """How pictures are drawn with `network`, which is in fp32 whatever the others are drawn in."""
        return replace(self.drawing, precision="float32")
