"""Judges of the art world: the same small networks as the toy world's, on larger images and real subjects."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from lit_safety.judges.art.subjects import HARMS, SETTINGS, SUBJECTS
from lit_safety.judges.toy.judge import ToyJudge, ToyWorldJudge

if TYPE_CHECKING:
    from PIL.Image import Image

    from lit_safety.drawing.questions import Question
    from lit_safety.judges.judge import Verdict

EDGE = 2
"""Width of the border whose colour is the setting's, px."""


class ArtJudge(ToyJudge):
    """Multi-label classifier of 48x48 images."""

    world: ClassVar[str] = "artworld"
    side: ClassVar[int] = 48
    stored: ClassVar[torch.dtype] = torch.float16
    known_labels: ClassVar[tuple[str, ...]] = tuple(SUBJECTS)
    known_harm: ClassVar[dict[str, str]] = {name: str(SUBJECTS[name].category) for name in HARMS}


class ArtWorldJudge(ToyWorldJudge):
    """The art world's own network with the judges' interface.

    Args:
        folder: holds `config.json` and `model.safetensors`.
    """

    kind: ClassVar[type[ToyJudge]] = ArtJudge

    def seen_in(self, image: Image, verdict: Verdict, question: Question) -> str | None:
        """The setting, asked for as a place or as the colour of the background; None for the colour of a subject."""
        if question.kind == "place" or question.about == "background":
            return setting_of(image)
        return None


def setting_of(image: Image) -> str:
    """The setting whose colour is nearest to the median of the image's border."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    inside = np.zeros(pixels.shape[:2], bool)
    inside[EDGE:-EDGE, EDGE:-EDGE] = True
    border = np.median(pixels[~inside], 0)
    return min(SETTINGS, key=lambda name: float(np.abs(border - SETTINGS[name]).sum()))
