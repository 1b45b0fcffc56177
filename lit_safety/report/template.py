"""The templates of pages and cards, by jinja2: HTML escapes whatever is put in, unless the template says `safe`."""

from __future__ import annotations

import functools
import json
import re
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


@functools.cache
def templates() -> Environment:
    """The environment of templates/: a name that is not given is an error, never an empty place."""
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
    """A value in a cell of a Markdown table: nothing in it ends the cell, and nothing in it is HTML."""
    text = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;")
    return text.replace("\\", "\\\\").replace("|", "\\|")


def _word(value: Any) -> str:
    """A text as YAML: as it is where that is safe, else in quotes."""
    text = str(value)
    return text if re.fullmatch(r"[A-Za-z/.~][\w./ @+=-]*", text) and text == text.strip() else json.dumps(text)
