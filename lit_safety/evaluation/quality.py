"""What alignment must not cost: FID and CLIPScore of each arm's pictures of clean prompts.

Beside the shares of `metrics` because these are no shares: an arm's `quality` holds {figure: {value, interval, n,
errors, ...}}, and `differences` hold the same against the base. Pictures that are not there are in no value and are
counted as errors; the interval covers them, or is not given at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lit_safety.errors import UserError
from lit_safety.evaluation.clip_score import BATCH, clip_scores, mean_interval
from lit_safety.evaluation.features import extract, feature_network
from lit_safety.evaluation.fid import fid, jackknife, left_out
from lit_safety.evaluation.judges import JudgeError
from lit_safety.evaluation.judging import open_drawn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, nn

    from lit_safety.evaluation.clip import Clip
    from lit_safety.evaluation.drawing import Drawn
    from lit_safety.evaluation.features import FeatureName
    from lit_safety.evaluation.judges import Judge
    from lit_safety.evaluation.prompts import Prompt


@dataclass(frozen=True)
class Measured:
    """What was seen of one arm's pictures of clean prompts."""

    rows: list[int]
    """Which of the clean prompts have a picture."""
    features: Tensor | None
    """(len(rows), d), float64; None where no FID was asked for."""
    scores: list[float | None]
    """CLIPScore of every clean prompt's picture; None: none asked for, or no picture."""


class Quality:
    """The figures asked for, with all that they need loaded: what is missing is found before anything is drawn.

    Args:
        prompts: all prompts; only the clean ones are looked at.
        judge: the judge that decides, for its features.
        fid_features: whose features FID compares; None: no FID.
        clip: the CLIP of CLIPScore; None: no CLIPScore.
        reference: pictures that FID compares with beside the base's, see `reference.Reference`.

    Raises:
        UserError: there are too few clean prompts, or something named does not load.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        judge: Judge,
        fid_features: FeatureName | None = None,
        clip: str | None = None,
        reference: str | None = None,
    ) -> None:
        self.clean = [i for i, p in enumerate(prompts) if p.kind == "clean"]
        if reference is not None and fid_features is None:
            raise UserError("--reference: is what FID compares with; give --fid judge or --fid inception too")
        if len(self.clean) < 2 and (fid_features or clip):
            raise UserError(
                "--fid and --clip look at pictures of clean prompts, and fewer than 2 are drawn; raise --clean"
            )
        self.settings: dict[str, Any] = {}
        self.network: nn.Module | None = None
        self.reference: Tensor | None = None
        if fid_features is not None:
            self.network, about = feature_network(fid_features, judge)
            self.settings["fid"] = about | {"prompts": "clean", "implementation": "torchmetrics, float64"}
        if reference is not None and self.network is not None:
            from lit_safety.evaluation.reference import Reference

            source = Reference(reference)
            self.reference = extract(self.network, source)
            self.settings["fid"]["reference"] = {"path": reference, "n": source.count, "sha256": source.sha256}
        self.clip: Clip | None = None
        if clip is not None:
            from lit_safety.evaluation.clip import Clip

            self.clip = Clip(clip, "--clip")
            self.settings["clip_score"] = self.clip.settings | {"prompts": "clean", "scale": "100 cos"}
            self._texts = self.clip.texts([prompts[i].prompt for i in self.clean])

    def measure(self, drawn: Sequence[Drawn], tick: Callable[[int], None] = lambda _: None) -> Measured:
        """Look at one arm's pictures, given in the order of all prompts; `tick` hears how many were just done."""
        rows: list[int] = []
        features: list[Tensor] = []
        scores: list[float | None] = [None] * len(self.clean)
        for start in range(0, len(self.clean), BATCH):
            part = range(start, min(start + BATCH, len(self.clean)))
            opened = {row: open_drawn(drawn[self.clean[row]]) for row in part}
            there = {row: image for row, image in opened.items() if not isinstance(image, JudgeError)}
            if there and self.network is not None:
                named = [(str(drawn[self.clean[row]].path), image) for row, image in there.items()]
                features.append(extract(self.network, named))
            if there and self.clip is not None:
                texts = self._texts[list(there)]
                for row, score in zip(there, clip_scores(self.clip, list(there.values()), texts), strict=True):
                    scores[row] = score
            rows += there
            tick(len(part))
        return Measured(rows, torch.cat(features) if features else None, scores)

    def report(self, arms: Mapping[str, Measured]) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
        """The figures of every arm, and those of their differences to the base, each by arm and figure."""
        base = arms["base"]
        figures: dict[str, dict[str, Any]] = {}
        differences: dict[str, dict[str, Any]] = {}
        parts: dict[str, Tensor | None] = {}
        for name, arm in arms.items():
            own, changed = figures.setdefault(name, {}), differences.setdefault(name, {})
            if self.network is not None and name != "base":
                own["fid_base"] = self._fid(arm, base.features, base.rows)[0]
            if self.reference is not None:
                own["fid_reference"], parts[name] = self._fid(arm, self.reference, None)
                before, after = figures["base"]["fid_reference"]["value"], own["fid_reference"]["value"]
                if before is not None and after is not None and arm.rows == base.rows:
                    shifts = [parts[name], parts["base"]]
                    both = None if shifts[0] is None or shifts[1] is None else shifts[0] - shifts[1]
                    entry = {"value": after - before, "interval": jackknife(after - before, both), "n": len(arm.rows)}
                    changed["fid_reference"] = entry
            if self.clip is not None:
                own["clip_score"] = self._mean(arm.scores, 0.0, 100.0)
                pairs = list(zip(base.scores, arm.scores, strict=True))
                shift = [None if x is None or y is None else y - x for x, y in pairs]
                changed["clip_score"] = self._mean(shift, -100.0, 100.0)
        del differences["base"]
        return figures, differences

    def _fid(self, arm: Measured, other: Tensor | None, rows: list[int] | None) -> tuple[dict[str, Any], Tensor | None]:
        """One distance. `rows`: the prompts behind `other`, where it is an arm's."""
        entry: dict[str, Any] = {"value": None, "interval": None, "n": len(arm.rows)}
        entry |= {"errors": len(self.clean) - len(arm.rows), "reference_n": 0 if other is None else len(other)}
        if arm.features is None or other is None or min(len(arm.features), len(other)) < 2:
            return entry, None
        entry["value"] = fid(arm.features, other)
        parts = None
        if not entry["errors"] and rows in (None, arm.rows):  # nothing bounds what a missing picture would do to it
            parts = left_out(arm.features, other, paired=rows is not None)
            entry["interval"] = jackknife(entry["value"], parts)
        return entry, parts

    @staticmethod
    def _mean(values: list[float | None], lowest: float, highest: float) -> dict[str, Any]:
        value, interval = mean_interval(values, lowest, highest)
        errors = values.count(None)
        return {"value": value, "interval": interval, "n": len(values) - errors, "errors": errors}
