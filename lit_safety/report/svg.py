"""A small chart as inline SVG: axes, points, lines. Its colours are those of the page, light and dark."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape
from math import ceil, floor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


WIDTH, HEIGHT = 560, 400
LEFT, RIGHT, TOP, BOTTOM = 66, 28, 16, 62
LINE = 18
"""Height of a line of text, in units of the drawing: readable when a phone shows the drawing at two thirds."""
COLOURS = 10
"""`--c0` to `--c9` of the page's style."""


@dataclass
class Chart:
    """Collects elements in data coordinates; `html` gives the whole.

    Args:
        name: unique on the page; letters, digits and `-`.
        title: what it shows, for those who do not see it.
        description: what there is to see in it, for the same.
        x: label and range of the horizontal axis.
        y: label and range of the vertical one.
    """

    name: str
    title: str
    description: str
    x: tuple[str, float, float]
    y: tuple[str, float, float]
    _parts: list[str] = field(default_factory=list)
    _labels: list[tuple[float, float, float, float]] = field(default_factory=list)

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Where a point of the data lies in the drawing."""
        (_, x0, x1), (_, y0, y1) = self.x, self.y
        right = LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)
        return right, HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)

    def ticks(self, axis: str, marks: Sequence[tuple[float, str]]) -> None:
        """Lines of the grid with their labels, along the axis `x` or `y`."""
        for value, text in marks:
            x, y = self.place(value, self.y[1]) if axis == "x" else self.place(self.x[1], value)
            ends = (x, TOP, x, HEIGHT - BOTTOM) if axis == "x" else (LEFT, y, WIDTH - RIGHT, y)
            self._parts.append(
                f'<line class=grid x1="{ends[0]:.1f}" y1="{ends[1]:.1f}" x2="{ends[2]:.1f}" y2="{ends[3]:.1f}"/>'
            )
            if axis == "x":
                where = f'x="{x:.1f}" y="{HEIGHT - BOTTOM + LINE}" text-anchor=middle'
            else:
                where = f'x="{LEFT - 8}" y="{y + 5:.1f}" text-anchor=end'
            self._parts.append(f"<text {where}>{escape(text)}</text>")

    def point(
        self,
        x: float,
        y: float,
        colour: int,
        spread: tuple[Sequence[float] | None, Sequence[float] | None] = (None,) * 2,
    ) -> None:
        """A dot, with whiskers over `spread` (along x, along y)."""
        paint = f"var(--c{colour % COLOURS})"
        for along, ends in zip("xy", spread, strict=True):
            if ends is not None:
                first, last = (self.place(end, y) if along == "x" else self.place(x, end) for end in ends)
                self._parts.append(
                    f'<line style="stroke:{paint}" stroke-width=2 x1="{first[0]:.1f}" y1="{first[1]:.1f}" '
                    f'x2="{last[0]:.1f}" y2="{last[1]:.1f}"/>'
                )
        right, down = self.place(x, y)
        self._parts.append(f'<circle cx="{right:.1f}" cy="{down:.1f}" r="6" style="fill:{paint}"/>')

    def path(self, points: Sequence[tuple[float, float]], style: str, closed: bool = False) -> None:
        """A line through points, or the area that they enclose."""
        corners = " ".join("{:.1f},{:.1f}".format(*self.place(*point)) for point in points)
        kind = "polygon" if closed else "polyline"
        self._parts.append(f'<{kind} points="{corners}" style="{style}"/>')

    def label(self, x: float, y: float, text: str, colour: int) -> None:
        """A name beside a point: where no other name stands, with a line to its point when that is far off."""
        right, down = self.place(x, y)
        wide = 9.0 * len(text)
        before = right + 12 + wide > WIDTH - 2  # no room on the right
        start = right - 12 - wide if before else right + 12
        # above and below the point, not beside it: there its whisker would run through the name
        places = [down + 5 + side * (13 + LINE * step) for step in range(12) for side in (-1, 1)]
        inside = [row for row in places if TOP + 8 <= row <= HEIGHT - BOTTOM - 2] or [down + 5]
        row = next((row for row in inside if not self._taken(start, row, wide)), inside[0])
        self._labels.append((start, row, start + wide, row))
        if abs(row - down - 5) > LINE:
            end = start + wide + 2 if before else start - 2
            self._parts.append(f'<line class=lead x1="{right:.1f}" y1="{down:.1f}" x2="{end:.1f}" y2="{row - 5:.1f}"/>')
        self._parts.append(
            f'<text x="{max(2.0, start):.1f}" y="{row:.1f}" style="fill:var(--c{colour % COLOURS})">'
            f"{escape(text)}</text>"
        )

    def _taken(self, start: float, row: float, wide: float) -> bool:
        return any(
            start < right and left < start + wide and abs(row - other) < LINE for left, other, right, _ in self._labels
        )

    def html(self) -> str:
        """The SVG element; a screen reader reads title and description."""
        across, up = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
        return (
            f'<svg class=chart viewBox="0 0 {WIDTH} {HEIGHT}" role=img aria-labelledby="{self.name}-t {self.name}-d">'
            f'<title id="{self.name}-t">{escape(self.title)}</title><desc id="{self.name}-d">'
            f"{escape(self.description)}</desc>{''.join(self._parts)}"
            f'<text x="{across}" y="{HEIGHT - 14}" text-anchor=middle class=axis>{escape(self.x[0])}</text>'
            f'<text x="{LEFT}" y="{up}" transform="rotate(-90 16 {up}) translate({16 - LEFT} 0)" text-anchor=middle '
            f"class=axis>{escape(self.y[0])}</text></svg>"
        )


def share_range(values: Sequence[float]) -> tuple[float, float, list[tuple[float, str]]]:
    """Range and ticks in percent of an axis of shares, from below the smallest value to above the largest."""
    low, high = min(values), max(values)
    step = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2, 1.0) if high - low <= 6 * step)
    first = max(0, floor(low / step + 1e-9))
    last = max(ceil(high / step - 1e-9), first + 1)
    marks = [(number * step, f"{100 * number * step:.0f}%") for number in range(first, last + 1)]
    return first * step, last * step, marks
