"""Other schedulers, numbers of steps and guidance scales than in alignment and evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

from lit_safety.attacks.target import Attack, Stage, Target
from lit_safety.core.errors import UserError


@dataclass
class Sampler:
    """One way of drawing; null means the run's own setting."""

    scheduler: str | None = None
    """Class name of a diffusers scheduler, such as EulerDiscreteScheduler."""
    steps: int | None = None
    guidance: float | None = None

    def label(self) -> str:
        """Such as `EulerDiscrete, 30 steps, guidance 7.5`."""
        parts = [(self.scheduler or "").removesuffix("Scheduler")]
        parts += [f"{self.steps} steps"] if self.steps is not None else []
        parts += [f"guidance {self.guidance:g}"] if self.guidance is not None else []
        return ", ".join(filter(None, parts))


class Samplers(Attack):
    """Draw the same prompts and seeds with other samplers.

    Args:
        samplers: the samplers, in the order in which they are tried.
    """

    budget: ClassVar[str] = "samplers tried"
    knows = "black box: chooses scheduler, steps and guidance"
    cumulative: ClassVar[bool] = True

    def __init__(self, samplers: list[Sampler]) -> None:
        for one in samplers:
            if one == Sampler() or (one.steps is not None and one.steps < 1) or not _finite(one.guidance):
                raise UserError(
                    f"Samplers: {asdict(one)}: give a scheduler, steps of at least 1 or a guidance of at least 0"
                )
        if not samplers:
            raise UserError("Samplers: samplers is empty; give at least one")
        self.samplers = samplers
        self.settings = {"samplers": [asdict(one) for one in samplers]}

    @property
    def points(self) -> int:
        return len(self.samplers)

    def refuses(self, target: Target) -> str | None:
        known = {one.__name__ for one in getattr(target.pipe.scheduler, "compatibles", [])}
        for one in self.samplers:
            if one.scheduler is not None and one.scheduler not in known:
                raise UserError(
                    f"attack Samplers: {one.scheduler} cannot replace {type(target.pipe.scheduler).__name__}; these "
                    f"can: {', '.join(sorted(known))}"
                )
        return None

    def stages(self, target: Target) -> Iterator[Stage]:
        for number, one in enumerate(self.samplers, 1):
            if one.guidance is not None and one.guidance <= 1 and target.arm.guard is not None:
                target.notes.append(f"{one.label()}: left out, the guard works only with classifier-free guidance")
                continue
            pipe = target.fresh()
            if one.scheduler is not None:
                pipe.scheduler = _scheduler(one.scheduler, pipe.scheduler.config)
            changes: dict[str, Any] = {k: v for k, v in asdict(one).items() if k != "scheduler" and v is not None}
            prompts = target.prompts
            if one.guidance is not None:  # because a prompt set's own column would override it
                prompts = [replace(prompt, guidance=None) for prompt in prompts]
            yield target.stage(
                number, pipe=pipe, prompts=prompts, label=one.label(), drawing=replace(target.drawing, **changes),
                identity={"scheduler_instead": type(pipe.scheduler).__name__},
                apply=lambda other, scheduler=pipe.scheduler: _with(other.pipe, scheduler),
            )  # fmt: skip


def _with(pipe: Any, scheduler: Any) -> Any:
    pipe.scheduler = type(scheduler).from_config(scheduler.config)
    return pipe


def _scheduler(name: str, config: Any) -> Any:
    import diffusers

    try:
        return getattr(diffusers, name).from_config(config)
    except (ImportError, ValueError) as error:
        raise UserError(f"attack Samplers: {name}: {' '.join(str(error).split())}") from error


def _finite(guidance: float | None) -> bool:
    return guidance is None or 0 <= guidance < float("inf")
