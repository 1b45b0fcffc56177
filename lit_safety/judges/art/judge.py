"""Judges of the art world: the same small networks as the toy world's, on larger images and real subjects."""

from typing import ClassVar

import torch

from lit_safety.judges.art.subjects import HARMS, SUBJECTS
from lit_safety.judges.toy.judge import ToyJudge, ToyWorldJudge


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
