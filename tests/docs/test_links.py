"""Links within the documents lead somewhere, and the site's menu names every page. Needs no mkdocs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.helpers.documents import FENCE, ROOT, documents

#: Pages that docs/hooks.py adds when the site is built.
GENERATED = {"reference/commands.md", "reference/configs.md", "reference/shards.md", "reference/toy-world.md"}
GENERATED |= {"results/benchmarks.md"}


def links(page: Path) -> list[str]:
    """Targets of links and images that are not addresses."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", documents(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for link in links(page):
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        assert file.is_relative_to(ROOT), f"{link} leads out of the repository"
        assert file.exists(), f"{link} leads nowhere"
        if anchor:
            assert anchor in anchors(file), f"{link}: {file.name} has no such heading"


def pages(menu: object) -> Iterator[str]:
    if isinstance(menu, str):
        yield menu
    elif isinstance(menu, dict | list):
        for part in menu.values() if isinstance(menu, dict) else menu:
            yield from pages(part)


def test_the_menu_names_every_page_once() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    named = list(pages(site["nav"]))
    written = {str(page.relative_to(ROOT / "docs")) for page in documents() if page.is_relative_to(ROOT / "docs")}
    assert sorted(named) == sorted(written | GENERATED)


def test_each_page_has_one_title() -> None:
    for page in documents():
        text = re.sub(r"^(    |\t).*$", "", FENCE.sub("", page.read_text(encoding="utf-8")), flags=re.MULTILINE)
        assert len(re.findall(r"^# ", text, re.MULTILINE)) == 1, page
