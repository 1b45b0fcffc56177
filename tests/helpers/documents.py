"""The project's documents, and the commands, files and links in them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
TOYWORLD = ROOT / "data" / "toyworld"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def documents() -> list[Path]:
    """Every page that a person writes: the READMEs and the site's pages. Tables of studies are written by a command."""
    readmes = [ROOT / "README.md", *(ROOT / folder / "README.md" for folder in ("data", "data/toyworld", "benchmarks"))]
    return readmes + sorted(page for page in (ROOT / "docs").rglob("*.md") if page.name != "table.md")


def blocks(page: Path, language: str) -> list[str]:
    """Fenced blocks of one language."""
    return [text for found, text in FENCE.findall(page.read_text(encoding="utf-8")) if found == language]


def commands(page: Path) -> list[list[str]]:
    """Words behind `lit-safety` or `-m lit_safety` of every command in a block of code, in the page's order."""
    text = re.sub(r"\\\n\s+", " ", FENCE.sub("", page.read_text(encoding="utf-8")))
    return [
        shlex.split(words, comments=True)
        for words in re.findall(r"^    (?:.*-m lit_safety|lit-safety) (.+)$", text, re.MULTILINE)
    ]


def files(page: Path) -> dict[str, str]:
    """Files that a page shows in full: blocks whose first line is a comment with the file's name."""
    found = FENCE.findall(page.read_text(encoding="utf-8"))
    named = [(re.match(r"# (\S+\.(?:py|yaml))\n", text), text) for _, text in found]
    return {match[1]: text for match, text in named if match}
