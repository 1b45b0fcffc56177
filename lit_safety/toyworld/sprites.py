"""Emblems as small pictures with an outline, cached by name, colour and size."""

from functools import cache, lru_cache

from PIL import Image, ImageChops, ImageDraw, ImageFilter

from lit_safety.toyworld.benign_emblems import BENIGN_EMBLEMS, LOOKALIKE_EMBLEMS
from lit_safety.toyworld.harm_emblems import HARM_EMBLEMS
from lit_safety.toyworld.palette import OUTLINE, PAINT
from lit_safety.toyworld.shapes import Shape

EMBLEMS: dict[str, tuple[Shape, ...]] = {**HARM_EMBLEMS, **BENIGN_EMBLEMS, **LOOKALIKE_EMBLEMS}
MASTER = 256
"""Side of the master drawing, px."""
OUTLINE_WIDTH = 12
"""Outline around the silhouette on the master, px."""


@cache
def _master(name: str, colour: str | None) -> Image.Image:
    """The emblem at full size, RGBA (MASTER, MASTER)."""
    fills = Image.new("RGBA", (MASTER, MASTER), (0, 0, 0, 0))
    pen = ImageDraw.Draw(fills)
    for shape in EMBLEMS[name]:
        if shape.colour == "own" and colour is None:
            raise ValueError(f"{name!r} must be given a colour")
        paint = PAINT[colour if shape.colour == "own" and colour else shape.colour]
        shape.draw(pen, MASTER / 2 - 0.5, paint)
    silhouette = fills.getchannel("A")
    grown = silhouette
    for _ in range(OUTLINE_WIDTH // 4):
        grown = grown.filter(ImageFilter.MaxFilter(9))
    outlined = Image.new("RGBA", (MASTER, MASTER), (*OUTLINE, 0))
    outlined.putalpha(grown)
    outlined.alpha_composite(fills)
    return outlined


@lru_cache(maxsize=4096)
def sprite(name: str, colour: str | None, radius: int, visible: float = 1.0) -> Image.Image:
    """The emblem, RGBA (2 radius, 2 radius); below the share `visible` of its height nothing is left of it."""
    small = _master(name, colour).resize((2 * radius, 2 * radius), Image.Resampling.BOX)
    if visible < 1.0:
        keep = Image.new("L", small.size, 0)
        keep.paste(255, (0, 0, small.width, round(visible * small.height)))
        small.putalpha(ImageChops.multiply(small.getchannel("A"), keep))
    return small
