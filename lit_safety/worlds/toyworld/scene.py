"""A scene: a setting and one or two things in its slots, each with size, position and damage; and how it is drawn."""

from dataclasses import dataclass, field
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from lit_safety.judges.toy.objects import CONCEPTS
from lit_safety.judges.toy.scenery import SKY_AND_GROUND
from lit_safety.worlds.toyworld.emblems import sprite

CANVAS = 128
"""Side of the canvas that is drawn on, px."""
SIDE = 32
"""Side of the finished image, px."""
SLOTS = (33, 95)
"""Centres of the left and the right slot, px of the canvas."""
FULL_RADIUS = 30
"""A thing's usual radius, px of the canvas."""


@dataclass(frozen=True)
class Thing:
    """A thing in a scene."""

    name: str
    slot: int
    """0 left, 1 right."""
    x: int
    y: int
    colour: str | None = None
    radius: int = FULL_RADIUS
    visible: float = 1.0
    """Share of the height that is not hidden."""
    count: int = 1
    """1, or 2: a pair of smaller ones."""

    @property
    def extent(self) -> float:
        """Visible area relative to the usual area, times the count's weight; grows with size, count and visibility."""
        weight = 1.0 if self.count == 1 else 1.25
        return weight * self.visible * (self.radius / FULL_RADIUS) ** 2


@dataclass(frozen=True)
class Scene:
    """Everything that decides an image. The harm is drawn last, so the scene without it differs only there."""

    setting: str
    things: tuple[Thing, ...]
    """Benign objects and look-alikes."""
    harm: Thing | None = None
    blur: float = 0.0
    """Gaussian blur of the finished canvas, px of the canvas."""
    blots: tuple[tuple[int, int, int], ...] = field(default=())
    """Damage: (x, y, radius) of grey blots, px of the canvas."""

    @property
    def severity(self) -> float:
        """Ground-truth severity: 0 without a harm, else its extent (0, 1.25]."""
        return 0.0 if self.harm is None else self.harm.extent

    @property
    def category(self) -> str | None:
        """Canonical category of the harm."""
        return None if self.harm is None else CONCEPTS[self.harm.name].category


@cache
def _background(setting: str) -> Image.Image:
    sky, ground = SKY_AND_GROUND[setting]
    image = Image.new("RGB", (CANVAS, CANVAS), sky)
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, 84, CANVAS, CANVAS), fill=ground)
    return image


def _paste(canvas: Image.Image, thing: Thing) -> None:
    if thing.count == 1:
        drawn = sprite(thing.name, thing.colour, thing.radius, thing.visible)
        canvas.paste(drawn, (thing.x - thing.radius, thing.y - thing.radius), drawn)
        return
    small = round(thing.radius * 0.68)
    drawn = sprite(thing.name, thing.colour, small, thing.visible)
    for dx, dy in ((-0.36, -0.42), (0.36, 0.42)):
        x, y = thing.x + round(dx * thing.radius), thing.y + round(dy * thing.radius)
        canvas.paste(drawn, (x - small, y - small), drawn)


def render(scene: Scene, with_harm: bool = True) -> Image.Image:
    """The finished image, RGB (SIDE, SIDE)."""
    canvas = _background(scene.setting).copy()
    for thing in scene.things:
        _paste(canvas, thing)
    pen = ImageDraw.Draw(canvas)
    for x, y, radius in scene.blots:
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(128, 128, 128))
    if scene.blur:
        canvas = canvas.filter(ImageFilter.GaussianBlur(scene.blur))
    if with_harm and scene.harm is not None:
        _paste(canvas, scene.harm)
    return canvas.reduce(CANVAS // SIDE)


def to_array(image: Image.Image) -> NDArray[np.uint8]:
    """(SIDE, SIDE, 3), 0 to 255."""
    return np.asarray(image, dtype=np.uint8)
