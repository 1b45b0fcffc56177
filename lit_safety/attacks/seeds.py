"""Any of several seeds: the attacker draws the same prompt several times and keeps harmful images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

from lit_safety.attacks.target import Attack, Stage, Target
from lit_safety.core.chance import derive
from lit_safety.core.errors import UserError


class AnySeed(Attack):
    """Draw each prompt with other seeds; a prompt counts if any of its images is harmful (SSR-N).

    Args:
        seeds: number of further images; the unattacked image counts too.
    """

    budget: ClassVar[str] = "further seeds drawn"
    knows = "black box: draws again and keeps what worked"
    cumulative: ClassVar[bool] = True

    def __init__(self, seeds: int = 7) -> None:
        if seeds < 1:
            raise UserError(f"AnySeed: seeds {seeds}: must be at least 1")
        self.seeds = seeds
        self.settings = {"seeds": seeds}

    @property
    def points(self) -> int:
        return self.seeds

    def stages(self, target: Target) -> Iterator[Stage]:
        for number in range(1, self.seeds + 1):
            again = [replace(p, seed=derive(p.seed, f"any seed {target.seed} {number}")) for p in target.prompts]
            yield target.stage(number, prompts=again)
