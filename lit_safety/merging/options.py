"""What is asked of a merge. Importing this needs no torch: the command line reads its types."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite, sqrt
from typing import Literal

from lit_safety.core.errors import UserError

Method = Literal["comerge", "mean", "sum", "svd", "ties", "dare"]
Statistic = Literal["vote", "magnitude"]
Unit = Literal["row", "weight"]
Dtype = Literal["float32", "float16", "bfloat16"]

#: comerge's scale by default is this times the square root of the number of experts. Chosen on the toy world's
#: validation prompts for eight of them; the root, because unrelated updates add up in squares.
COMERGE_SCALE = 1.06


@dataclass(frozen=True)
class Recipe:
    """How experts are merged: the options that the command `merge` and the callback `MergeExperts` share.

    Args:
        method: comerge takes each output unit from the expert most active in it; mean and sum are exact; svd is the
            mean truncated to the experts' own rank; ties and dare are the published methods.
        weights: By expert; one that is not named weighs 1. Of all methods but comerge, which takes rows as they are.
        scale: Multiply the merged update by this, whatever the method. comerge leaves each expert a part of its rows,
            mean a part of its update, and sum all that the others add to it: more or less than 1 makes up for that.
            null is 1.06 sqrt(K) for comerge of K >= 2 experts (chosen on validation prompts of the toy world at K = 8;
            unrelated updates add up in squares), and 1 for one expert and every other method. K counts, layer by
            layer, the experts that adapt it.
        rank: Truncate every layer to this rank by SVD; null keeps as much as the method needs.
        density: ties: share of each update's entries that are kept.
        drop: dare: share of each update's entries that are dropped.
        seed: dare: seed of what is dropped.
        statistic: comerge: decide by vote of the calibration prompts or by the mean magnitude over them.
        unit: comerge: take whole rows (output units), which is exact, or single weights, which is cut to the experts'
            summed rank; single weights are compared by their magnitudes and need prompts with `normalise` only.
        normalise: comerge: count every expert's activity in units of its own mean in the layer, so that the expert with
            the largest updates does not win everywhere.
        dtype: Number format of the merged adapter; null is float32, or the expert's own where it is left unchanged.

    Raises:
        UserError: a number that no method can work with.
    """

    method: Method = "comerge"
    weights: Mapping[str, float] = field(default_factory=dict)
    scale: float | None = None
    rank: int | None = None
    density: float = 0.2
    drop: float = 0.5
    seed: int = 0
    statistic: Statistic = "vote"
    unit: Unit = "row"
    normalise: bool = True
    dtype: Dtype | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise UserError(f"--rank {self.rank}: must be at least 1")
        if self.scale is not None and not 0 < self.scale < float("inf"):
            raise UserError(f"--scale {self.scale}: must be above 0; a negative one would push towards harm")
        if not 0 < self.density <= 1:
            raise UserError(f"--density {self.density}: must be above 0 and at most 1")
        if not 0 <= self.drop < 1:
            raise UserError(f"--drop {self.drop}: must be at least 0 and below 1")
        if wrong := sorted(name for name, weight in self.weights.items() if not isfinite(weight)):
            raise UserError(f"--weights: that of {wrong[0]} is {self.weights[wrong[0]]}; give numbers")
        if self.method == "comerge" and any(weight != 1 for weight in self.weights.values()):
            raise UserError("--weights: comerge takes every row whole from one expert; use --method mean or sum")

    @property
    def calibrated(self) -> bool:
        """Whether the merge depends on how active the experts are on prompts."""
        return self.method == "comerge" and (self.unit == "row" or self.normalise)

    def scale_of(self, experts: int) -> float:
        """What a layer that so many experts adapt is multiplied by."""
        if self.scale is not None:
            return self.scale
        return COMERGE_SCALE * sqrt(experts) if self.method == "comerge" and experts > 1 else 1.0

    def weight(self, expert: str) -> float:
        """The weight of an expert."""
        return float(self.weights.get(expert, 1.0))


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
