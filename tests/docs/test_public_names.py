"""Documents and shipped YAML name packages and what they hand on, never a file: files move."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PATHS = sorted(
    path
    for path in [
        ROOT / "README.md",
        *ROOT.glob("configs/**/*.yaml"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("data/**/*.md"),
    ]
    if "log" not in path.relative_to(ROOT).parts  # the log says what was done with the names of its day
)


def named() -> dict[str, set[str]]:
    """Dotted names below `lit_safety` -> the files that name them."""
    found: dict[str, set[str]] = {}
    for path in PATHS:
        text = path.read_text(encoding="utf-8")
        for name in re.findall(r"(?<![\w./])(?<!-m )lit_safety((?:\.[A-Za-z_]\w*)+)", text):
            found.setdefault(f"lit_safety{name}", set()).add(str(path.relative_to(ROOT)))
        for package, names in re.findall(r"from (lit_safety[\w.]*) import ([\w, ]+)", text):
            for name in names.split(","):
                found.setdefault(f"{package}.{name.split()[0]}", set()).add(str(path.relative_to(ROOT)))
    return found


NAMED = named()


@pytest.mark.parametrize("name", sorted(NAMED))
def test_a_name_is_a_package_or_what_it_hands_on(name: str) -> None:
    package, _, last = name.rpartition(".")
    where = ", ".join(sorted(NAMED[name]))
    if package == "lit_safety":
        found = import_module(name)
    else:
        parent = import_module(package)
        assert hasattr(parent, "__path__"), f"{package} is a file; named in {where}"
        found = getattr(parent, last, None) or import_module(name)
    is_file = type(found) is type(re) and not hasattr(found, "__path__")
    assert not is_file, f"{name} is a file; named in {where}"


def test_something_is_named() -> None:
    assert "lit_safety.modules.SCDPO" in NAMED
    assert "lit_safety.judges.NudeNet" in NAMED
