"""Whether a drawn image is harmful: a judge's verdict, a cost model's cost, or both. Fails closed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lit_safety.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

PATIENCE = 16
"""Images of which at least one must be assessed before the run goes on."""


@dataclass(frozen=True)
class Assessment:
    """What is known of an image's harm."""

    harmful: bool
    """The judge's verdict; without a judge, whether the cost is above 0."""
    cost: float | None = None
    """The cost model's value, above 0 harmful."""


class Assessor:
    """Assess images by a judge, a cost model or both.

    Args:
        judge: folder of a judge (`lit_safety.evaluation.judges.load_judge`).
        cost_model: folder of an exported cost model.
        device: where the cost model runs.

    Raises:
        UserError: neither is given, or one does not load.
    """

    def __init__(self, judge: str | None, cost_model: str | None, device: str = "cpu") -> None:
        if judge is None and cost_model is None:
            raise UserError("give --judge, --cost_model or both: every image is checked before it becomes data")
        self.judge: Any = None
        self.costs: Any = None
        self.settings: dict[str, Any] = {}
        """What decides: for the manifest."""
        self._seen = self._known = 0
        self._why = ""
        if judge is not None:
            from lit_safety.evaluation.judges import load_judge

            self.judge = load_judge(judge)
            self.settings["judge"] = {key: self.judge.settings.get(key) for key in ("name", "threshold", "sha256")}
        if cost_model is not None:
            from lit_safety.cost_model.files import load_cost_model
            from lit_safety.evaluation.fingerprint import fingerprint

            self.costs = load_cost_model(cost_model, device)
            self.settings["cost_model_sha256"] = fingerprint(cost_model)

    def check(self, categories: Iterable[str], prompts: str) -> None:
        """Refuse a judge that does not see what the prompts ask for: its "safe" would become a label.

        Raises:
            UserError: names the category.
        """
        if self.judge is not None:
            from lit_safety.evaluation.judges import check_sees

            check_sees(self.judge, categories, f"--prompts {prompts}")

    def __call__(self, images: Sequence[Image]) -> list[Assessment | None]:
        """One assessment an image; None where there is none: such an image is neither safe nor harmful.

        Raises:
            UserError: none of the first images could be assessed, so something is wrong with the judge or cost model.
        """
        if not images:
            return []
        costs = self._costs(images)
        harmful = [cost is not None and cost > 0 for cost in costs] if self.judge is None else self._verdicts(images)
        found = [
            None if verdict is None or (self.costs is not None and cost is None) else Assessment(verdict, cost)
            for verdict, cost in zip(harmful, costs, strict=True)
        ]
        self._seen += len(found)
        self._known += sum(one is not None for one in found)
        if self._seen >= PATIENCE and not self._known:
            raise UserError(f"none of the first {self._seen} images could be judged: {self._why}")
        return found

    def _costs(self, images: Sequence[Image]) -> list[float | None]:
        """None where there is no cost model, or no cost."""
        if self.costs is None:
            return [None] * len(images)
        values = [float(value) for value in self.costs.costs(list(images))]
        if len(values) != len(images):
            raise UserError(f"the cost model gave {len(values)} costs for {len(images)} images")
        if not all(map(math.isfinite, values)):
            self._why = "the cost model's cost is not finite"
        return [value if math.isfinite(value) else None for value in values]

    def _verdicts(self, images: Sequence[Image]) -> list[bool | None]:
        from lit_safety.evaluation.judges import JudgeError
        from lit_safety.evaluation.judging import judge_safely

        answers = judge_safely(self.judge, images)
        self._why = next((answer.reason for answer in answers if isinstance(answer, JudgeError)), self._why)
        return [None if isinstance(answer, JudgeError) else answer.harmful for answer in answers]
