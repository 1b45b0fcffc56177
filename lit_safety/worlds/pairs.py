"""What the worlds' preference pairs have in common."""

from dataclasses import dataclass
from typing import Any

from PIL import Image

SAFE_COST, LOOKALIKE_COST = -1.0, -0.5
"""Ground-truth cost of a safe image, and of one with a look-alike, which is nearer to the border."""
KINDS = ("harmful", "clean_harm", "harmful", "clean_quality", "harmful", "clean_harm")
"""The kinds of a set, in turn: half harmful prompts, a third clean ones with a harmful rejected image, a sixth
clean ones with two safe images."""


@dataclass(frozen=True)
class Pair:
    """What `ShardWriter.write` takes."""

    key: str
    metadata: dict[str, Any]
    chosen: Image.Image
    rejected: Image.Image
