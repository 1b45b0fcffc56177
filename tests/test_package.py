"""What the build writes for a package index; hatchling itself is not needed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """hatch_build.py, with an empty class in the place of each of hatchling's."""
    for name, kind in (
        ("hatchling.metadata.plugin.interface", "MetadataHookInterface"),
        ("hatchling.builders.hooks.plugin.interface", "BuildHookInterface"),
    ):
        stand_in = ModuleType(name)
        setattr(stand_in, kind, type(kind, (), {"__class_getitem__": classmethod(lambda cls, item: cls)}))
        monkeypatch.setitem(sys.modules, name, stand_in)
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_image_and_links_of_the_readme_lead_to_the_repository(build: ModuleType) -> None:
    text = build.long_description((ROOT / "README.md").read_text(), "https://example.org/a/b")
    assert "](https://example.org/a/b/raw/HEAD/docs/before_after.png)" in text
    assert "](https://example.org/a/b/blob/HEAD/docs/tutorials/own-model.md)" in text
    assert "](docs/" not in text
    assert "](data/" not in text


def test_without_a_repository_nothing_leads_nowhere(build: ModuleType) -> None:
    text = build.long_description("![a](b.png)\n\n# T\n\n[one](docs/x.md), [two](https://e.org), [three](#t)", None)
    assert text == "# T\n\none, [two](https://e.org), [three](#t)"


@pytest.mark.parametrize(
    ("remote", "page"),
    [
        ("https://example.org/a/b.git", "https://example.org/a/b"),
        ("https://name:word@example.org/a/b", "https://example.org/a/b"),
        ("git@example.org:a/b.git\n", "https://example.org/a/b"),
        ("ssh://git@example.org/a/b.git", "https://example.org/a/b"),
        ("/srv/git/b", None),
        ("file:///srv/git/b", None),
        ("", None),
    ],
)
def test_a_remote_has_a_page_or_none(build: ModuleType, remote: str, page: str | None) -> None:
    assert build.web_address(remote) == page


def test_there_is_one_version() -> None:
    from lit_safety import __version__

    assert f"version: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert 'dynamic = ["version", "readme"]' in (ROOT / "pyproject.toml").read_text()
    assert (ROOT / "lit_safety" / "py.typed").is_file()
