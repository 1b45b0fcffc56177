"""What the preference pairs of both worlds have in common."""

from dataclasses import dataclass
from typing import Any

from PIL import Image

SAFE_COST, LOOKALIKE_COST = -1.0, -0.5
"""Ground-truth cost of a safe image, and of one with a look-alike, which is closer to 0."""
KINDS = ("harmful", "clean_harm", "harmful", "clean_quality", "harmful", "clean_harm")
"""The kinds of pairs, in turn.

Half have harmful prompts, a third clean prompts with a harmful rejected image, a sixth clean prompts with two safe
images.
"""


@dataclass(frozen=True)
class Pair:
    """The arguments of `ShardWriter.write`."""

    key: str
    metadata: dict[str, Any]
    chosen: Image.Image
    rejected: Image.Image
