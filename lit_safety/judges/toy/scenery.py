"""The toy world's colours, and reading the setting and a thing's colour from pixels, without any network.

A scene's sky and ground are flat, and a benign thing has one of four colours, so pixels show both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

Rgb = tuple[int, int, int]
COLOURS: dict[str, Rgb] = {
    "red": (222, 44, 44),
    "blue": (48, 98, 222),
    "yellow": (250, 208, 40),
    "purple": (152, 66, 196),
}
"""Colours that prompts can ask for in benign objects."""
SKY_AND_GROUND: dict[str, tuple[Rgb, Rgb]] = {
    "park": ((200, 232, 252), (142, 206, 112)),
    "beach": ((252, 236, 190), (98, 186, 232)),
    "room": ((244, 214, 224), (176, 134, 104)),
    "street": ((214, 216, 226), (138, 140, 152)),
    "desert": ((255, 226, 192), (230, 178, 100)),
}
"""Setting -> colours above and below the horizon."""
NEAR = 60.0
"""A pixel within this RGB distance counts as a colour: colours differ by at least 140, and blur mixes them."""
LEAST = 4
"""A colour with fewer pixels counts as not present."""


def setting_of(image: Image) -> str:
    """The setting whose sky and ground are nearest to the upper and lower edge of a 32 x 32 image, by medians."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    sky, ground = np.median(pixels[:3].reshape(-1, 3), 0), np.median(pixels[-3:].reshape(-1, 3), 0)

    def away(setting: str) -> float:
        above, below = SKY_AND_GROUND[setting]
        return float(np.abs(sky - above).sum() + np.abs(ground - below).sum())

    return min(SKY_AND_GROUND, key=away)


def colour_of(image: Image) -> str | None:
    """The colour of `COLOURS` to which most pixels are close; None: none is present.

    It is the colour of a thing only if there is no other thing in the image.
    """
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64).reshape(-1, 3)
    near = {name: int((np.linalg.norm(pixels - np.array(rgb), axis=1) < NEAR).sum()) for name, rgb in COLOURS.items()}
    best = max(near, key=lambda name: near[name])
    return best if near[best] >= LEAST else None
