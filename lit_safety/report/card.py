"""The one model card, the README.md next to exported weights, and the jinja2 templates that pages and cards share.

A card is Markdown with the hub's front matter.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


@functools.cache
def templates() -> Environment:
    """The environment of templates/: a name without a value is an error, never an empty text."""
    found = Environment(
        loader=PackageLoader("lit_safety.report"),
        autoescape=lambda name: name is None or name.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    found.filters["cell"] = _cell
    found.filters["word"] = _word
    return found


def _cell(value: Any) -> str:
    """A value in a cell of a Markdown table, escaped so that it cannot end the cell or become HTML."""
    text = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;")
    return text.replace("\\", "\\\\").replace("|", "\\|")


def _word(value: Any) -> str:
    """A text as YAML: unchanged if that is safe, else in quotes."""
    text = str(value)
    return text if re.fullmatch(r"[A-Za-z/.~][\w./ @+=-]*", text) and text == text.strip() else json.dumps(text)


#: On every card of a LoRA, because everybody who loads it must know it.
WARNING = """\
**Do not negate it.** With a negative adapter scale the same weights push the model towards harmful images, and a
scale between 0 and 1 protects only in part. A LoRA can be unloaded: it makes a model safer for people who want that. It
cannot stop people who have the weights."""


@dataclass(frozen=True)
class Section:
    """A heading, and optionally a text, a table and a note.

    Args:
        title: the heading.
        text: Markdown above the table.
        head: the table's first row.
        rows: its cells, shown as text; empty: no table.
        note: Markdown below the table.
    """

    title: str
    text: str = ""
    head: Sequence[str] = ()
    rows: Sequence[Sequence[Any]] = ()
    note: str = ""


@dataclass(frozen=True)
class Card:
    """A whole card.

    Args:
        title: its heading.
        text: Markdown below it: what it is, how to load it, what it does not do.
        sections: the rest.
        base_model: folder or hub id, for the front matter; None: no front matter.
        tags: for the front matter.
    """

    title: str
    text: str
    sections: Sequence[Section]
    base_model: str | None = None
    tags: Sequence[str] = ()


def card_text(card: Card) -> str:
    """The card as Markdown."""
    return templates().get_template("card.md").render(card=card)


def settings(values: Mapping[str, Any], title: str = "Settings", text: str = "", note: str = "") -> Section:
    """A section with a table of names and values."""
    return Section(title, text, ("setting", "value"), list(values.items()), note)


def run_settings(values: Mapping[str, Any], text: str = "") -> Section:
    """The same for a run, whose config.yaml is next to the card."""
    return settings(values, text=text, note="The whole resolved configuration is in `config.yaml`.")


def last_validation(metrics: Mapping[str, float], none: str = "No validation was run.", note: str = "") -> Section:
    """The section with the metrics of a run's last validation.

    Args:
        metrics: name -> number.
        none: the text if there are none.
        note: Markdown below.
    """
    rows = [(name, f"{value:.4g}") for name, value in metrics.items()]
    return Section("Last validation", "" if rows else none, ("metric", "value"), rows, note)


def code(text: object) -> str:
    """A text as code in Markdown, escaped so that it cannot end the code."""
    return f"`{' '.join(str(text).replace('`', chr(39)).split())}`"
