"""Prompts and pairs made with one's own model."""

from .pairs import ClipScorer as ClipScorer
from .pairs import Scorer as Scorer

__all__ = ["ClipScorer", "Scorer"]
