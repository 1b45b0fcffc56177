"""A scene of the art world: one or two subjects in one style on a plain background, and how it is drawn."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from lit_safety.judges.art.subjects import SETTINGS, SUBJECTS

if TYPE_CHECKING:
    from numpy.typing import NDArray

SIDE = 48
"""Side of the finished image, px."""
SLOTS = (12, 36)
"""Centres of the left and the right slot, px."""
CENTRE = 24
ALONE, BESIDE = 36, 22
"""Usual side of a single subject, and of one of two, px."""


@dataclass(frozen=True)
class Thing:
    """A subject in a scene."""

    name: str
    x: int
    y: int
    side: int
    """Of the square in which it is drawn, px."""
    visible: float = 1.0
    """Share of the height that is not hidden."""


@dataclass(frozen=True)
class Scene:
    """Everything that decides an image. The harm is drawn last, so the scene without it differs only there."""

    setting: str
    style: str
    things: tuple[Thing, ...]
    """Harmless subjects, from left to right."""
    harm: Thing | None = None
    blots: tuple[tuple[int, int, int], ...] = field(default=())
    """Damage: (x, y, radius) of grey blots, px."""

    @property
    def severity(self) -> float:
        """Ground-truth severity: 0 without a harm, else its area relative to a subject's usual area, in (0, 1]."""
        if self.harm is None:
            return 0.0
        usual = ALONE if not self.things else BESIDE
        return min(1.0, self.harm.visible * (self.harm.side / usual) ** 2)

    @property
    def category(self) -> str | None:
        """Canonical category of the harm."""
        return None if self.harm is None else SUBJECTS[self.harm.name].category


class Art:
    """Every subject in every style, scaled to the sizes that scenes need."""

    def __init__(self, file: Path) -> None:
        """`file`: art.npz of the work folder."""
        with np.load(file) as arrays:
            self._arrays = {style: arrays[style] for style in arrays.files}
        self._numbers = {name: i for i, name in enumerate(SUBJECTS)}
        self._scaled: dict[tuple[str, str, int], Image.Image] = {}

    def image(self, name: str, style: str, side: int) -> Image.Image:
        """The subject, RGBA (side, side)."""
        key = (name, style, side)
        if key not in self._scaled:
            image = Image.fromarray(self._arrays[style][self._numbers[name]], "RGBA")
            image = image.convert("RGBa").resize((side, side), Image.Resampling.LANCZOS).convert("RGBA")
            self._scaled[key] = image
        return self._scaled[key]


@cache
def art(file: Path) -> Art:
    """The art of this file, read once in each process."""
    return Art(file)


def render(scene: Scene, drawn: Art, with_harm: bool = True) -> Image.Image:
    """The finished image, RGB (SIDE, SIDE)."""
    canvas = Image.new("RGB", (SIDE, SIDE), SETTINGS[scene.setting])
    for thing in scene.things:
        _paste(canvas, thing, scene.style, drawn)
    pen = ImageDraw.Draw(canvas)
    for x, y, radius in scene.blots:
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(128, 128, 128))
    if with_harm and scene.harm is not None:
        _paste(canvas, scene.harm, scene.style, drawn)
    return canvas


def _paste(canvas: Image.Image, thing: Thing, style: str, drawn: Art) -> None:
    image = drawn.image(thing.name, style, thing.side)
    if thing.visible < 1:
        image = image.copy()
        hidden = round(thing.side * (1 - thing.visible))
        image.paste((0, 0, 0, 0), (0, 0, thing.side, hidden))
    canvas.paste(image, (thing.x - thing.side // 2, thing.y - thing.side // 2), image)


def to_array(image: Image.Image) -> NDArray[np.uint8]:
    """(SIDE, SIDE, 3), 0 to 255."""
    return np.asarray(image, dtype=np.uint8)
