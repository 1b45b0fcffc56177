"""Flat shapes in an emblem's own frame: x and y run from -1 (left, top) to 1 (right, bottom)."""

from collections.abc import Callable
from math import cos, pi, sin
from typing import NamedTuple

from PIL import ImageDraw

Point = tuple[float, float]


class Shape(NamedTuple):
    """One filled shape. `colour` is a name of `palette.PAINT`, or "own" for the asked colour."""

    colour: str
    draw: Callable[[ImageDraw.ImageDraw, float, tuple[int, int, int]], None]


def poly(colour: str, *points: Point) -> Shape:
    """A filled polygon."""

    def draw(pen: ImageDraw.ImageDraw, half: float, fill: tuple[int, int, int]) -> None:
        pen.polygon([((x + 1) * half, (y + 1) * half) for x, y in points], fill=fill)

    return Shape(colour, draw)


def disc(colour: str, x: float, y: float, rx: float, ry: float | None = None) -> Shape:
    """A filled ellipse with centre and radii."""
    ry = rx if ry is None else ry

    def draw(pen: ImageDraw.ImageDraw, half: float, fill: tuple[int, int, int]) -> None:
        pen.ellipse([(x - rx + 1) * half, (y - ry + 1) * half, (x + rx + 1) * half, (y + ry + 1) * half], fill=fill)

    return Shape(colour, draw)


def ring(colour: str, x: float, y: float, radius: float, width: float) -> Shape:
    """A circle's outline, `width` thick, inside `radius`."""

    def draw(pen: ImageDraw.ImageDraw, half: float, fill: tuple[int, int, int]) -> None:
        box = [(x - radius + 1) * half, (y - radius + 1) * half, (x + radius + 1) * half, (y + radius + 1) * half]
        pen.ellipse(box, outline=fill, width=round(width * half))

    return Shape(colour, draw)


def box(colour: str, x0: float, y0: float, x1: float, y1: float, corner: float = 0.0) -> Shape:
    """A filled rectangle, its corners rounded by `corner`."""

    def draw(pen: ImageDraw.ImageDraw, half: float, fill: tuple[int, int, int]) -> None:
        edges = [(x0 + 1) * half, (y0 + 1) * half, (x1 + 1) * half, (y1 + 1) * half]
        pen.rounded_rectangle(edges, radius=corner * half, fill=fill)

    return Shape(colour, draw)


def line(colour: str, width: float, *points: Point) -> Shape:
    """A thick broken line with round joints."""

    def draw(pen: ImageDraw.ImageDraw, half: float, fill: tuple[int, int, int]) -> None:
        pen.line([((x + 1) * half, (y + 1) * half) for x, y in points], fill, round(width * half), joint="curve")

    return Shape(colour, draw)


def burst(colour: str, points: int, outer: float, inner: float, x: float = 0.0, y: float = 0.0) -> Shape:
    """A star with so many points, one of them up."""
    corners = []
    for i in range(2 * points):
        angle, reach = pi * i / points - pi / 2, outer if i % 2 == 0 else inner
        corners.append((x + reach * cos(angle), y + reach * sin(angle)))
    return poly(colour, *corners)


def heart(colour: str, size: float) -> tuple[Shape, ...]:
    """A heart: two discs and a wedge."""
    r = 0.5 * size
    return (
        disc(colour, -0.45 * size, -0.35 * size, r),
        disc(colour, 0.45 * size, -0.35 * size, r),
        poly(colour, (-0.9 * size, -0.14 * size), (0.9 * size, -0.14 * size), (0, 0.95 * size)),
    )
