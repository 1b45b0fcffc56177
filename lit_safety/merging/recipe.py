"""What is asked of a merge. Importing this needs no torch: the command line reads its types."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from lit_safety.errors import UserError

Method = Literal["comerge", "mean", "sum", "svd", "ties", "dare"]
Statistic = Literal["vote", "magnitude"]
Unit = Literal["row", "weight"]
Dtype = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class Recipe:
    """How experts are merged.

    Raises:
        UserError: a number that no method can work with.
    """

    method: Method = "comerge"
    weights: Mapping[str, float] = field(default_factory=dict)
    """By expert; one that is not named weighs 1. Of all methods but comerge, which takes rows as they are."""
    rank: int | None = None
    """Truncate every layer's update to this rank by SVD; None: as exact as the method allows."""
    density: float = 0.2
    """Share of entries that TIES keeps."""
    drop: float = 0.5
    """Share of entries that DARE drops."""
    seed: int = 0
    """Of DARE's draws."""
    statistic: Statistic = "vote"
    """What comerge decides by, row by row."""
    unit: Unit = "row"
    """What comerge takes from one expert: a whole output unit, or every weight by itself."""
    normalise: bool = False
    """comerge: every expert's activity counts in units of its own mean in the layer."""
    dtype: Dtype | None = None
    """Number format of the file; None: fp32, or the expert's own where it is returned unchanged."""

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise UserError(f"--rank {self.rank}: must be at least 1")
        if not 0 < self.density <= 1:
            raise UserError(f"--density {self.density}: must be above 0 and at most 1")
        if not 0 <= self.drop < 1:
            raise UserError(f"--drop {self.drop}: must be at least 0 and below 1")
        if self.method == "comerge" and any(weight != 1 for weight in self.weights.values()):
            raise UserError("--weights: comerge takes every row whole from one expert; use --method mean or sum")

    @property
    def calibrated(self) -> bool:
        """Whether the merge depends on how active the experts are on prompts."""
        return self.method == "comerge" and (self.unit == "row" or self.normalise)

    def weight(self, expert: str) -> float:
        """The weight of an expert."""
        return float(self.weights.get(expert, 1.0))
