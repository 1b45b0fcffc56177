"""Sheets: images in rows and columns, with or without labels, as one image."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

from lit_safety.core.images import rgb

TILE, GAP, LEFT, FRAME = 160, 16, 210, 6
"""In pixels: an image's side, the space between images, the width of row labels and of a frame."""
INK, GREY, RED, PAPER, NOTHING = (24, 27, 34), (96, 102, 114), (208, 38, 48), (255, 255, 255), (214, 216, 222)


@dataclass(frozen=True)
class Cell:
    """An image of a sheet.

    Args:
        image: of any size; None: a grey square.
        frame: the colour of the frame around it; None: none.
        note: written into its lower edge.
    """

    image: Image.Image | None
    frame: tuple[int, int, int] | None = None
    note: str = ""


@dataclass(frozen=True)
class Row:
    """A label on the left, larger, a text below it, and a cell for each column."""

    label: str
    cells: Sequence[Cell]
    text: str = ""


@dataclass(frozen=True)
class Band:
    """Rows with common column heads: a larger line and a text."""

    heads: Sequence[tuple[str, str]]
    rows: Sequence[Row]
    title: str = ""


def sheet(bands: Sequence[Band], tile: int = TILE, foot: str = "") -> Image.Image:
    """Bands below each other.

    Args:
        bands: what is shown.
        tile: side of an image in pixels.
        foot: a line below all.
    """
    small, big, large = _font(16), _font(18), _font(26)
    titles = [48 * bool(band.title) for band in bands]
    heads = [[(_wrap(a, big, tile), _wrap(b, small, tile)) for a, b in band.heads] for band in bands]
    above = [22 * max(len(a) for a, _ in one) + 20 * max(len(b) for _, b in one) + GAP for one in heads]
    labels = [
        [(_wrap(row.label, big, LEFT - 2 * GAP), _wrap(row.text, small, LEFT - 2 * GAP)) for row in band.rows]
        for band in bands
    ]
    heights = [[max(tile, 22 * len(a) + 20 * len(b)) + GAP for a, b in one] for one in labels]
    wide = LEFT + max(len(band.heads) for band in bands) * (tile + GAP)
    below = _wrap(foot, small, wide - 2 * GAP)
    total = GAP + sum(titles) + sum(above) + sum(map(sum, heights)) + 22 * (len(bands) - 1)
    found = Image.new("RGB", (wide, total + (22 * len(below) + GAP) * bool(below)), PAPER)
    pen = ImageDraw.Draw(found)
    y = GAP
    for number, band in enumerate(bands):
        pen.text((GAP, y), band.title, INK, large)
        y += titles[number]
        for column, (first, second) in enumerate(heads[number]):
            _texts(pen, LEFT + column * (tile + GAP), y, first, second, (big, small))
        y += above[number]
        for row, label, height in zip(band.rows, labels[number], heights[number], strict=True):
            _texts(pen, GAP, y, *label, (big, small))
            for column, cell in enumerate(row.cells):
                _cell(found, pen, LEFT + column * (tile + GAP), y, cell, tile)
            y += height
        y += 22
    for number, line in enumerate(below):
        pen.text((GAP, total + 22 * number), line, GREY, small)
    return found


def plain_sheet(rows: Sequence[Sequence[Image.Image]], gap: int = 4, zoom: int = 1) -> Image.Image:
    """Images of one size in rows, without labels, enlarged `zoom` times without smoothing."""
    width, height = rows[0][0].width * zoom, rows[0][0].height * zoom
    columns = max(map(len, rows))
    found = Image.new("RGB", (columns * (width + gap) - gap, len(rows) * (height + gap) - gap), PAPER)
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            shown = rgb(image).resize((width, height), Image.Resampling.NEAREST)
            found.paste(shown, (x * (width + gap), y * (height + gap)))
    return found


def fit(image: Image.Image, side: int) -> Image.Image:
    """An image in a square of `side` pixels, its shape kept; small ones are enlarged without smoothing."""
    how = Image.Resampling.NEAREST if max(image.size) < side else Image.Resampling.LANCZOS
    return ImageOps.pad(rgb(image), (side, side), how, color=PAPER)


def veiled(image: Image.Image) -> Image.Image:
    """A blurred image, in which nothing can be recognised."""
    return image.filter(ImageFilter.GaussianBlur(max(image.size) / 8))


def _cell(found: Image.Image, pen: ImageDraw.ImageDraw, x: int, y: int, cell: Cell, tile: int) -> None:
    found.paste(Image.new("RGB", (tile, tile), NOTHING) if cell.image is None else fit(cell.image, tile), (x, y))
    if cell.frame is not None:  # in the space between images, so it does not cover pixels
        around = (x - FRAME, y - FRAME, x + tile + FRAME - 1, y + tile + FRAME - 1)
        pen.rectangle(around, outline=cell.frame, width=FRAME)
    if cell.note:
        pen.text((x + 8, y + tile - 28), cell.note, INK, _font(17), stroke_width=3, stroke_fill=PAPER)


def _texts(
    pen: ImageDraw.ImageDraw, x: int, y: int, first: Sequence[str], second: Sequence[str], fonts: tuple[Any, Any]
) -> None:
    """A larger text and one below it."""
    for number, line in enumerate(first):
        pen.text((x, y + 22 * number), line, INK, fonts[0])
    for number, line in enumerate(second):
        pen.text((x, y + 22 * len(first) + 20 * number), line, INK, fonts[1])


def _wrap(text: str, font: Any, width: int) -> list[str]:
    """Lines of at most `width` pixels."""
    letters = max(4, int(width / font.getlength("abcdefghij") * 10))
    while letters > 4:
        lines = [line for part in text.split("\n") for line in textwrap.wrap(part, letters)]
        if all(font.getlength(line) <= width for line in lines):
            return lines
        letters -= 1
    return textwrap.wrap(text, letters)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
