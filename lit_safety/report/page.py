"""The one page: blocks of plain data, shown as a single HTML file without scripts."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from PIL import Image

from lit_safety.report.card import templates
from lit_safety.report.charts import COLOURS

LARGEST = 320
"""Side in pixels above which an image is shrunk for the page."""
TINY = 64
"""Side in pixels up to which it is enlarged without smoothing."""


class Block:
    """A part of a page; `kind` names the macro in templates/blocks.html that shows it."""

    kind: ClassVar[str]


@dataclass(frozen=True)
class Heading(Block):
    kind = "heading"
    text: str
    level: int = 2


@dataclass(frozen=True)
class Text(Block):
    kind = "text"
    text: str
    soft: bool = False


@dataclass(frozen=True)
class Switch(Block):
    """The checkbox that shows all blurred images; once a page."""

    kind = "switch"
    text: str


@dataclass(frozen=True)
class Tile:
    title: str
    value: str
    note: str


@dataclass(frozen=True)
class Tiles(Block):
    kind = "tiles"
    tiles: Sequence[Tile]


@dataclass(frozen=True)
class Alarm(Block):
    kind = "alarm"
    title: str
    items: Sequence[str]
    note: str


MARKS = {"harm": "\u2715", "safe": "\u2713", "open": "?"}
"""What a caption shows by sign, frame and colour, so that it does not depend on colours alone."""


@dataclass(frozen=True)
class Shown:
    """An image with its caption.

    Args:
        name: in bold before the caption.
        says: the caption's text.
        source: of `data_uri`; None: there is no image, and `alt` says why.
        alt: a description, for people who cannot see it.
        small: enlarge it without smoothing.
        veil: the image is blurred until it is clicked; this text says what the click does. Empty: not blurred.
        mark: which of `MARKS` is before the caption; empty: none.
    """

    name: str
    says: str
    source: str | None
    alt: str
    small: bool = False
    veil: str = ""
    mark: str = ""


@dataclass(frozen=True)
class Card:
    """Images that belong together, under a text."""

    text: str
    images: Sequence[Shown]
    bold: str = ""


@dataclass(frozen=True)
class Cards(Block):
    """Cards below each other; side by side if `across` says how many images wide a card is."""

    kind = "cards"
    cards: Sequence[Card]
    across: int = 0


@dataclass(frozen=True)
class Bar:
    """A row of a figure: a share as a bar with its interval, or only a number.

    Args:
        name: the arm's name.
        shown: the figure as text, with its interval in brackets.
        value: the share; None: no bar, or one of length 0.
        interval: its ends; None: no bar.
        colour: number of its colour.
        note: the difference to another one.
        tone: `up`, `down` or `soft`, the colour of the note.
        absent: why there is no figure; the rest is then left out.
    """

    name: str
    shown: str = ""
    value: float | None = None
    interval: Sequence[float] | None = None
    colour: int = 0
    note: str = ""
    tone: str = "soft"
    absent: str = ""


@dataclass(frozen=True)
class Bars:
    caption: str
    bars: Sequence[Bar]


@dataclass(frozen=True)
class Figure(Block):
    """A figure with its meaning and tables. `folded` ones are open only if there are no others."""

    kind = "figure"
    title: str
    text: str
    tables: Sequence[Bars]
    folded: Sequence[Bars] = ()
    fold: str = ""


@dataclass(frozen=True)
class Table(Block):
    """Cells of text. A main table has a label, and the first cell of its rows stays visible."""

    kind = "table"
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    label: str = ""


@dataclass(frozen=True)
class ChartFigure:
    """A chart with its caption.

    Args:
        svg: of `charts.svg`, the only text that is not escaped.
        caption: what it shows.
        legend: names with the numbers of their colours.
        remarks: a text below.
        table: the same as numbers, folded.
    """

    svg: str
    caption: str
    legend: Sequence[tuple[str, int]] = ()
    remarks: str = ""
    table: Table | None = None


@dataclass(frozen=True)
class Charts(Block):
    kind = "charts"
    charts: Sequence[ChartFigure]


@dataclass(frozen=True)
class Settings(Block):
    """Names and values; mappings in them are folded."""

    kind = "settings"
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Fold(Block):
    kind = "fold"
    title: str
    blocks: Sequence[Block]


def page(title: str, eyebrow: str, heading: str, lead: str, blocks: Sequence[Block]) -> str:
    """The whole file.

    Args:
        title: the title in the browser's tab.
        eyebrow: a small line above the heading.
        heading: the one heading of the first level.
        lead: the first sentences.
        blocks: all below, from top to bottom.
    """
    about = {"title": title, "eyebrow": eyebrow, "heading": heading, "lead": lead}
    return templates().get_template("page.html").render(about | _helpers(), blocks=blocks)


def fragment(blocks: Sequence[Block]) -> str:
    """The HTML of the blocks, without the page around them."""
    show: Any = templates().get_template("blocks.html").make_module(_helpers())
    return str(show.show(blocks))


def data_uri(image: Image.Image) -> tuple[str, bool]:
    """An image as a data URI, and whether it is small enough to be enlarged without smoothing. Changes its size."""
    small = max(image.size) <= TINY
    content = io.BytesIO()
    if small:
        image.save(content, "PNG")
    else:
        image.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
        image.save(content, "JPEG", quality=85)
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}", small


def _helpers() -> dict[str, Any]:
    return {"percent": lambda share: f"{100 * share:.2f}", "words": _words, "colours": COLOURS, "marks": MARKS}


def _words(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(str(one.get("name", one)) if isinstance(one, dict) else str(one) for one in value)
    return str(value)
