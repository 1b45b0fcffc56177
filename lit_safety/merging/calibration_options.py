"""How the experts' activity is measured for comerge. Importing this needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from lit_safety.errors import UserError


@dataclass(frozen=True)
class CalibrationOptions:
    """What comerge measures the experts on.

    Args:
        prompts: CSV file with a column `prompt`, or a folder of shards. Where the category is known only harmful
            prompts are taken, as many of each category. Do not give the prompts that a report is made of.
        categories: Take prompts of these categories only; null takes all.
        count: How many prompts are taken.
        timesteps: At how many noise levels, evenly spread, the base model is looked at for each prompt.
        steps: Denoising steps of the base's own drawings.
        guidance: Guidance of these drawings; 3 suits the toy world, 7.5 is common for Stable Diffusion.
        batch_size: Prompts at once.
        seed: Seed of drawings and noise.
        other_world: Take prompts of an embedded world, such as data/toyworld, for a model that is not of this world.

    Raises:
        UserError: a number that cannot be meant.
    """

    prompts: str | None = None
    categories: list[str] | None = None
    count: int = 64
    timesteps: int = 4
    steps: int = 20
    guidance: float = 3.0
    batch_size: int = 8
    seed: int = 0
    other_world: bool = False

    def __post_init__(self) -> None:
        for name in ("count", "timesteps", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--calibration.{name} {getattr(self, name)}: must be at least 1")
