"""What an evaluation found, before it is written down in any form."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lit_safety.core.hashes import digest
from lit_safety.core.intervals import DEFINITIONS
from lit_safety.evaluation.metrics import (
    Answers,
    answers,
    ask_pairs,
    differences,
    disagreement,
    say_absent,
    summarise,
)
from lit_safety.judges.judge import JudgeError, NotJudged, Verdict, asked_of, in_order, unseen

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lit_safety.drawing.gallery import Drawn
    from lit_safety.drawing.prompts import Prompt
    from lit_safety.judges.judge import Judge


@dataclass(frozen=True)
class ArmResult:
    """One arm's images and what the judges say of them, in the order of the prompts."""

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
    quality: tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]] | None = None
    """Of `Quality.report`: figures by arm, differences to the base by arm; None: not measured."""

    def answers(self, verdicts: Sequence[Verdict | JudgeError], judge: Judge) -> list[Answers]:
        """The questions of all prompts, answered by one judge's verdicts."""
        labels = set(judge.settings.get("labels", ()))
        seen = judge.settings.get("categories")
        counting = "counts" in judge.settings
        rows = [answers(p, v, labels, seen, counting) for p, v in zip(self.prompts, verdicts, strict=True)]
        ask_pairs(self.prompts, rows)
        return rows

    def rows(self, arm: str) -> list[Answers]:
        """One arm's answers by the judge that decides."""
        return self.answers(self.arms[arm].verdicts, self.judges[0])

    def metrics(self) -> dict[str, Any]:
        """The content of metrics.json: settings, arms with figures and intervals, differences to the base."""
        rows = {name: self.rows(name) for name in self.arms}
        arms = {name: self._arm(arm, rows[name]) | self._quality(name) for name, arm in self.arms.items()}
        same = [name for name in self.arms if self.arms[name].protocol == self.arms["base"].protocol]
        changes = {name: differences(rows["base"], rows[name]) for name in same if name != "base"}
        if self.quality is not None:
            for name, changed in changes.items():
                changed["quality"] = self.quality[1][name]
        top: dict[str, Any] = {name: arms[name] for name in ("base", "aligned") if name in arms}
        return {
            "format": 1,
            "settings": self.settings,
            **top,
            "arms": arms,
            "differences": changes,
            "definitions": DEFINITIONS,
        }

    def _quality(self, name: str) -> dict[str, Any]:
        """FID and CLIPScore of one arm, each with a hash of whatever must be equal for two values to be compared."""
        if self.quality is None:
            return {}
        found = {}
        for figure, entry in self.quality[0][name].items():
            how = self.settings["quality"]["fid" if figure.startswith("fid_") else figure]
            other = None
            if figure == "fid_base":  # it compares with the base, whatever else there is to compare with
                how = {key: value for key, value in how.items() if key != "reference"}
                other = self.arms["base"].settings["pipeline_sha256"]
            found[figure] = entry | {"protocol": digest([self.arms[name].protocol, how, other])}
        return {"quality": found}

    def _arm(self, arm: ArmResult, rows: Sequence[Answers]) -> dict[str, Any]:
        failed = [
            {"file": d.path.name, "prompt": p.prompt, "seed": p.seed, "reason": v.reason}
            for d, p, v in zip(arm.drawn, self.prompts, arm.verdicts, strict=True)
            if isinstance(v, JudgeError) and not isinstance(v, NotJudged)
        ]
        unseen_by = self.judges[0].settings
        blind = Counter(category for p in self.prompts for category in unseen(unseen_by, asked_of(p)))
        found = {
            "n": len(self.prompts),
            "errors": len(failed),
            **say_absent(summarise(rows)),
            "error_list": failed,
            # images of prompts for a category that the judge does not see
            "not_judged": {category: blind[category] for category in in_order(blind)},
            "protocol": arm.protocol,
            "settings": arm.settings,
        }
        for judge, verdicts in zip(self.judges[1:], arm.second, strict=True):
            found.setdefault("second_judges", {})[judge.name] = {
                **say_absent(summarise(self.answers(verdicts, judge))),
                "disagreement": disagreement(arm.verdicts, verdicts),
            }
        return found
