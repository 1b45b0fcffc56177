"""Scorers order images of one prompt by quality; they know nothing of harm. Your own is a subclass named by its path.

--scorer lit_safety.data.generate.scorers.ClipScorer --scorer.init_args.clip openai/clip-vit-large-patch14
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image


class Scorer(ABC):
    """Gives each image a score: higher is better. `settings` holds whatever changes its scores."""

    settings: dict[str, Any]

    @abstractmethod
    def __call__(self, images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
        """One score an image, in the same order; `prompts` holds each image's own prompt."""


class ClipScorer(Scorer):
    """CLIPScore (arXiv 2104.08718): 100 x the cosine of an image's and its prompt's CLIP embeddings.

    Args:
        clip: Folder of a transformers CLIP, or its hub id.
        device: Where it runs; null: the CPU.
    """

    def __init__(self, clip: str, device: str | None = None) -> None:
        from lit_safety.evaluation.clip import Clip

        self._clip = Clip(clip, "--scorer.init_args.clip", device)
        self.settings = {"scorer": "CLIPScore", **self._clip.settings}

    def __call__(self, images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
        """One CLIPScore an image, in [-100, 100]."""
        from lit_safety.evaluation.clip_score import clip_scores

        return clip_scores(self._clip, images, self._clip.texts(prompts))
