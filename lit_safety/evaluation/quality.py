"""What alignment must not cost: FID, CLIPScore and preference scores of each arm's images of clean prompts.

Beside the shares of `metrics` because these are not shares: an arm's `quality` holds {figure: {value, interval, n,
errors, ...}}, and `differences` hold the same against the base. Images that are not there are in no value and are
counted as errors; the interval covers them, or is not given at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite, isinf
from typing import TYPE_CHECKING, Any

import torch

from lit_safety.core.errors import UserError
from lit_safety.judges.clip import BATCH, clip_scores, mean_interval
from lit_safety.judges.fid import extract, feature_network, fid, jackknife, left_out
from lit_safety.judges.judge import JudgeError
from lit_safety.judges.judging import open_drawn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from PIL.Image import Image
    from torch import Tensor, nn

    from lit_safety.drawing.gallery import Drawn
    from lit_safety.drawing.prompts import Prompt
    from lit_safety.judges.clip import Clip
    from lit_safety.judges.fid import FeatureName
    from lit_safety.judges.judge import Judge
    from lit_safety.judges.scorers import PreferenceScorer


@dataclass(frozen=True)
class Measured:
    """What was seen of one arm's images of clean prompts."""

    rows: list[int]
    """Which of the clean prompts have an image."""
    features: Tensor | None
    """(len(rows), d), float64; None without FID."""
    scores: list[float | None]
    """CLIPScore of every clean prompt's image; None: without CLIPScore, or without an image."""
    liked: list[list[float | None]]
    """Each preference scorer's scores of every clean prompt's image; None: without an image or a finite score."""


class Quality:
    """The figures asked for, with all that they need loaded: what is missing is found before anything is drawn.

    Args:
        prompts: all prompts; only the clean ones are looked at.
        judge: the judge that decides, for its features.
        fid_features: whose features FID compares; None: no FID.
        clip: the CLIP of CLIPScore; None: no CLIPScore.
        reference: images that FID compares with next to the base's, see `reference.Reference`.
        scorers: preference scorers.

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
        scorers: Sequence[PreferenceScorer] = (),
    ) -> None:
        self.prompts = [p.prompt for p in prompts if p.kind == "clean"]
        self.scorers = list(scorers)
        self._reason = "no finite number"
        self.clean = [i for i, p in enumerate(prompts) if p.kind == "clean"]
        if reference is not None and fid_features is None:
            raise UserError("--reference: is only for FID; give --fid judge or --fid inception too")
        if len(self.clean) < 2 and (fid_features or clip or scorers):
            raise UserError(
                "--fid, --clip and --preference look at images of clean prompts, and fewer than 2 are drawn; raise "
                "--clean"
            )
        names = [scorer.name for scorer in self.scorers]
        if len(names) > len(set(names)):
            raise UserError(
                f"--preference: two scorers have the same name, of {', '.join(names)}; give each its own `name`"
            )
        self.settings: dict[str, Any] = {f"preference/{one.name}": one.settings for one in self.scorers}
        self.network: nn.Module | None = None
        self.reference: Tensor | None = None
        if fid_features is not None:
            self.network, about = feature_network(fid_features, judge)
            self.settings["fid"] = about | {"prompts": "clean", "implementation": "torchmetrics, float64"}
        if reference is not None and self.network is not None:
            from lit_safety.drawing.reference_images import Reference

            source = Reference(reference)
            self.reference = extract(self.network, source)
            self.settings["fid"]["reference"] = {"path": reference, "n": source.count, "sha256": source.sha256}
        self.clip: Clip | None = None
        if clip is not None:
            from lit_safety.judges.clip import Clip

            self.clip = Clip(clip, "--clip")
            self.settings["clip_score"] = self.clip.settings | {"prompts": "clean", "scale": "100 cos"}
            self._texts = self.clip.texts([prompts[i].prompt for i in self.clean])

    def measure(self, drawn: Sequence[Drawn], tick: Callable[[int], None] = lambda _: None) -> Measured:
        """Look at one arm's images, given in the order of all prompts; `tick` hears how many were just done."""
        rows: list[int] = []
        features: list[Tensor] = []
        scores: list[float | None] = [None] * len(self.clean)
        liked: list[list[float | None]] = [[None] * len(self.clean) for _ in self.scorers]
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
                    scores[row] = score if isfinite(score) else None
            for own, scorer in zip(liked, self.scorers, strict=True):
                for row, one in self._score(scorer, there).items():
                    own[row] = one
            rows += there
            tick(len(part))
        for own, scorer in zip(liked, self.scorers, strict=True):
            if rows and own.count(None) == len(own):
                raise UserError(
                    f"--preference: {scorer.name} failed on every image: {self._reason}; the images stay, leave it "
                    "out to get the report"
                )
        return Measured(rows, torch.cat(features) if features else None, scores, liked)

    def _score(self, scorer: PreferenceScorer, images: Mapping[int, Image]) -> dict[int, float | None]:
        """A scorer's answers; None if it fails or a number is not finite."""
        if not images:
            return {}
        try:
            found = scorer.score(list(images.values()), [self.prompts[row] for row in images])
            if len(found) != len(images):
                raise ValueError(f"{len(found)} scores of {len(images)} images")
        except Exception as error:  # a scorer is somebody else's code: its failure on these images
            if len(images) > 1:
                return {row: one for part in images.items() for row, one in self._score(scorer, dict([part])).items()}
            self._reason = f"{type(error).__name__}: {error}"
            return dict.fromkeys(images)
        return {row: one if isfinite(one) else None for row, one in zip(images, found, strict=True)}

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
            for scorer, own_scores, before_scores in zip(self.scorers, arm.liked, base.liked, strict=True):
                own[f"preference/{scorer.name}"] = self._mean(own_scores)
                both_scores = zip(before_scores, own_scores, strict=True)
                shift = [None if x is None or y is None else y - x for x, y in both_scores]
                changed[f"preference/{scorer.name}"] = self._mean(shift)
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
        if not entry["errors"] and rows in (None, arm.rows):  # nothing bounds what a missing image would do to it
            parts = left_out(arm.features, other, paired=rows is not None)
            entry["interval"] = jackknife(entry["value"], parts)
        return entry, parts

    @staticmethod
    def _mean(values: list[float | None], lowest: float = -inf, highest: float = inf) -> dict[str, Any]:
        value, interval = mean_interval(values, lowest, highest)
        errors = values.count(None)
        if errors and isinf(highest):  # nothing bounds what a missing image would do to it
            interval = None
        return {"value": value, "interval": interval, "n": len(values) - errors, "errors": errors}
