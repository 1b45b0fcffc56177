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
from PIL.Image import Image

from lit_safety.core.errors import UserError
from lit_safety.judges.clip import BATCH, clip_scores, mean_interval
from lit_safety.judges.fid import extract, feature_network, fid, jackknife, left_out
from lit_safety.judges.judging import Opened, look
from lit_safety.judges.placing import Place, place

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

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
        where: where the networks of FID and CLIPScore compute; None: on the CPU in float32. Judge and scorers are
            placed already.

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
        where: Place | None = None,
    ) -> None:
        self.where = where or Place()
        self.prompts = [p.prompt for p in prompts if p.kind == "clean"]
        self.scorers = list(scorers)
        self.reason = "no finite number"
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
            self.where.move(self.network)
            about["precision"] = self.where.precision
            self.settings["fid"] = about | {"prompts": "clean", "implementation": "torchmetrics, float64"}
        if reference is not None and self.network is not None:
            from lit_safety.drawing.reference_images import Reference

            source = Reference(reference)
            self.reference = extract(self.network, source, self.where)
            self.settings["fid"]["reference"] = {"path": reference, "n": source.count, "sha256": source.sha256}
        self.clip: Clip | None = None
        if clip is not None:
            from lit_safety.judges.clip import Clip

            self.clip = Clip(clip, "--clip")
            place(self.clip, self.where)
            self.settings["clip_score"] = self.clip.settings | {"prompts": "clean", "scale": "100 cos"}
            self.texts = self.clip.texts([prompts[i].prompt for i in self.clean])

    def measure(self, drawn: Sequence[Drawn], tick: Callable[[int], None] = lambda _: None) -> Measured:
        """Look at one arm's images, given in the order of all prompts; `tick` hears how many were just seen.

        Raises:
            UserError: as `Measuring.result`.
        """
        measuring = Measuring(self, drawn)
        look(drawn, [measuring], BATCH, tick)
        return measuring.result()

    def score(self, scorer: PreferenceScorer, images: Mapping[int, Image]) -> dict[int, float | None]:
        """A scorer's answers; None if it fails or a number is not finite."""
        if not images:
            return {}
        try:
            found = scorer.score(list(images.values()), [self.prompts[row] for row in images])
            if len(found) != len(images):
                raise ValueError(f"{len(found)} scores of {len(images)} images")
        except Exception as error:  # a scorer is somebody else's code: its failure on these images
            if len(images) > 1:
                return {row: one for part in images.items() for row, one in self.score(scorer, dict([part])).items()}
            self.reason = f"{type(error).__name__}: {error}"
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


class Measuring:
    """One arm's images of clean prompts are looked at, `BATCH` at once.

    Args:
        quality: what is measured.
        drawn: the arm's images, in the order of all prompts.
    """

    def __init__(self, quality: Quality, drawn: Sequence[Drawn]) -> None:
        self.quality = quality
        self.drawn = drawn
        self._number = {row: number for number, row in enumerate(quality.clean)}
        self._waiting: dict[int, Opened] = {}
        self._rows: list[int] = []
        self._features: list[Tensor] = []
        self._scores: list[float | None] = [None] * len(quality.clean)
        self._liked: list[list[float | None]] = [[None] * len(quality.clean) for _ in quality.scorers]
        self._error: UserError | None = None

    def wants(self, row: int) -> bool:
        """Whether the image is of a clean prompt."""
        return row in self._number

    def see(self, rows: range, opened: Sequence[Opened]) -> None:
        """Look at the next images."""
        for row, one in zip(rows, opened, strict=True):
            if row in self._number:
                self._waiting[self._number[row]] = one
            if len(self._waiting) == BATCH:
                self._measure()

    def result(self) -> Measured:
        """What was seen, once all images were.

        Raises:
            UserError: features are not finite or an image has a size that the network does not take, or a scorer fails
                on every image.
        """
        self._measure()
        if self._error is not None:
            raise self._error
        for own, scorer in zip(self._liked, self.quality.scorers, strict=True):
            if self._rows and own.count(None) == len(own):
                raise UserError(
                    f"--preference: {scorer.name} failed on every image: {self.quality.reason}; the images stay, leave "
                    "it out to get the report"
                )
        features = torch.cat(self._features) if self._features else None
        return Measured(self._rows, features, self._scores, self._liked)

    def _measure(self) -> None:
        """Measure what waits. An error is raised at the end: those of judges come first."""
        waiting, self._waiting = self._waiting, {}
        if self._error is not None:
            return
        quality = self.quality
        there = {row: image for row, image in waiting.items() if isinstance(image, Image)}
        try:
            if there and quality.network is not None:
                named = [(str(self.drawn[quality.clean[row]].path), image) for row, image in there.items()]
                self._features.append(extract(quality.network, named, quality.where))
        except UserError as error:
            self._error = error
            return
        if there and quality.clip is not None:
            texts = quality.texts[list(there)]
            for row, score in zip(there, clip_scores(quality.clip, list(there.values()), texts), strict=True):
                self._scores[row] = score if isfinite(score) else None
        for own, scorer in zip(self._liked, quality.scorers, strict=True):
            for row, one in quality.score(scorer, there).items():
                own[row] = one
        self._rows += there
