"""CLIPScore: how well a picture fits its prompt, 100 x the cosine of their CLIP vectors (Hessel et al. 2021).

Scaled as torchmetrics scales it. Not its class: that cuts a long prompt's end token off, at which CLIP reads the text,
gives no score a picture (so no interval), and fails on the outputs of transformers 5.
"""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING

from lit_safety.evaluation.intervals import Z

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image
    from torch import Tensor

    from lit_safety.evaluation.clip import Clip

BATCH = 64


def clip_scores(clip: Clip, images: Sequence[Image], texts: Tensor) -> list[float]:
    """100 cos of each picture and its text's unit vector, row by row of `texts` (B, d)."""
    return (100 * (clip.images(images).double() * texts.double()).sum(1)).tolist()


def mean_interval(
    values: Sequence[float | None], lowest: float, highest: float
) -> tuple[float | None, list[float] | None]:
    """Mean of the values that are there, and its 95% interval, mean -+ 1.96 s / sqrt(n).

    A missing value (None) is in no mean; the interval covers whatever it would have been, from `lowest` to `highest`.
    The interval is None with fewer than two values.
    """
    given = [v for v in values if v is not None]
    if not given:
        return None, None
    value = sum(given) / len(given)
    if len(values) < 2:
        return value, None
    low = _bounds([lowest if v is None else v for v in values])[0]
    return value, [low, _bounds([highest if v is None else v for v in values])[1]]


def _bounds(values: Sequence[float]) -> tuple[float, float]:
    n = len(values)
    mean = sum(values) / n
    half = Z * sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)
    return mean - half, mean + half
