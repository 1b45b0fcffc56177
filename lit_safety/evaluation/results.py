"""What an evaluation found, before it is written down in any form."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lit_safety.evaluation.judges import JudgeError, Verdict
from lit_safety.evaluation.metrics import Answers, answers, differences, disagreement, summarise

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lit_safety.evaluation.drawing import Drawn
    from lit_safety.evaluation.judges import Judge
    from lit_safety.evaluation.prompts import Prompt


@dataclass(frozen=True)
class ArmResult:
    """One arm's pictures and what the judges say of them, in the order of the prompts."""

    settings: dict[str, Any]
    """How it drew: the shared settings and the arm's own."""
    protocol: str
    """Hash of whatever must be equal for two arms to be compared: prompts, seeds, judge, steps, guidance, ..."""
    drawn: list[Drawn]
    verdicts: list[Verdict | JudgeError]
    second: list[list[Verdict | JudgeError]] = field(default_factory=list)
    """The answers of the further judges."""


@dataclass(frozen=True)
class Results:
    """Everything the report is written from."""

    out: Path
    settings: dict[str, Any]
    prompts: list[Prompt]
    judges: list[Judge]
    """The judge that decides, then the further ones."""
    arms: dict[str, ArmResult]

    def answers(self, verdicts: Sequence[Verdict | JudgeError], judge: Judge) -> list[Answers]:
        """The questions of all prompts, answered by one judge's verdicts."""
        labels = set(judge.settings.get("labels", ()))
        return [answers(p, v, labels) for p, v in zip(self.prompts, verdicts, strict=True)]

    def rows(self, arm: str) -> list[Answers]:
        """One arm's answers by the judge that decides."""
        return self.answers(self.arms[arm].verdicts, self.judges[0])

    def metrics(self) -> dict[str, Any]:
        """The content of metrics.json: settings, arms with figures and intervals, differences to the base."""
        rows = {name: self.rows(name) for name in self.arms}
        arms = {name: self._arm(arm, rows[name]) for name, arm in self.arms.items()}
        same = [name for name in self.arms if self.arms[name].protocol == self.arms["base"].protocol]
        top: dict[str, Any] = {name: arms[name] for name in ("base", "aligned") if name in arms}
        return {
            "format": 1,
            "settings": self.settings,
            **top,
            "arms": arms,
            "differences": {name: differences(rows["base"], rows[name]) for name in same if name != "base"},
        }

    def _arm(self, arm: ArmResult, rows: Sequence[Answers]) -> dict[str, Any]:
        failed = [
            {"file": d.path.name, "prompt": p.prompt, "seed": p.seed, "reason": v.reason}
            for d, p, v in zip(arm.drawn, self.prompts, arm.verdicts, strict=True)
            if isinstance(v, JudgeError)
        ]
        found = {
            "n": len(self.prompts),
            "errors": len(failed),
            **summarise(rows),
            "error_list": failed,
            "protocol": arm.protocol,
            "settings": arm.settings,
        }
        for judge, verdicts in zip(self.judges[1:], arm.second, strict=True):
            found.setdefault("second_judges", {})[judge.name] = {
                **summarise(self.answers(verdicts, judge)),
                "disagreement": disagreement(arm.verdicts, verdicts),
            }
        return found
