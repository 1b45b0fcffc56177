"""Imports point downward: from a floor to itself or to one below it, and never in a circle of files."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lit_safety"
#: From the top floor down. A file may import from its own floor and from those behind it.
FLOORS = (
    "__main__",
    "cli",
    "dossier",
    "study",
    "worlds",
    "callbacks",
    "modules",
    "merging",
    "attacks",
    "evaluation",
    "generation",
    "judges",
    "drawing",
    "cost_model",
    "data",
    "backbones",
    "adapters",
    "users",
    "report",
    "objectives",
    "core",
)


def module_of(file: Path) -> str:
    """`lit_safety.data.datamodule`; a package's `__init__` is the package."""
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(files: dict[str, Path], module: str) -> Iterator[str]:
    """The files of ours that a file imports: at its top, inside functions, and for types."""
    for node in ast.walk(ast.parse(files[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in files)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in files:
                    yield inner
                elif node.module in files:
                    yield node.module


def floor_of(module: str) -> int:
    """Counted from the top; the package itself is below everything."""
    parts = module.split(".")
    return FLOORS.index(parts[1]) if len(parts) > 1 else len(FLOORS)


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    """Which file imports which. A package's `__init__` only hands names on and is left out."""
    files = {module_of(file): file for file in PACKAGE.rglob("*.py")}
    return {
        module: set(imports(files, module)) - {module} for module, file in files.items() if file.name != "__init__.py"
    }


def test_every_file_stands_on_a_floor(graph: dict[str, set[str]]) -> None:
    assert {module.split(".")[1] for module in graph} <= set(FLOORS)


def test_no_file_imports_from_a_floor_above_its_own(graph: dict[str, set[str]]) -> None:
    upward = [
        f"{module} imports {other}"
        for module, others in graph.items()
        for other in others
        if floor_of(other) < floor_of(module)
    ]
    assert not upward, "\n".join(sorted(upward))


def test_inside_the_package_files_import_files(graph: dict[str, set[str]]) -> None:
    through = [
        f"{module} imports {other}" for module, others in graph.items() for other in others if other not in graph
    ]
    assert not [line for line in through if not line.endswith(" lit_safety")], "\n".join(sorted(through))


def test_no_circle_of_files(graph: dict[str, set[str]]) -> None:
    done: set[str] = set()
    circles: list[list[str]] = []

    def follow(module: str, way: list[str]) -> None:
        if module in way:
            circles.append([*way[way.index(module) :], module])
        elif module not in done:
            for other in sorted(graph.get(module, ())):
                follow(other, [*way, module])
            done.add(module)

    for module in sorted(graph):
        follow(module, [])
    assert not circles, "\n".join(" -> ".join(circle) for circle in circles)
