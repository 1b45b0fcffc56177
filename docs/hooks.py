"""What the site holds beside the pages of this folder: help of commands, configs, packages, files from elsewhere.

Nothing of it is committed: it is generated at each build, so that it cannot differ from the code.
"""

from __future__ import annotations

import ast
import io
import os
import re
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from posixpath import relpath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = "reference/commands.md"
CONFIGS = "reference/configs.md"

#: Page of the site -> the file of the repository that it shows.
MIRRORS = {
    "reference/shards.md": "data/README.md",
    "reference/toy-world.md": "data/toyworld/README.md",
    "results/benchmarks.md": "benchmarks/README.md",
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put a page for each package that exports names at the end of the section Reference."""
    (reference,) = (section["Reference"] for section in config.nav or [] if "Reference" in section)
    reference.append({"Packages": [{name: f"reference/{name}.md"} for name in packages()]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    pages = {COMMANDS: commands_page(), CONFIGS: configs_page()}
    pages |= {page: (ROOT / file).read_text(encoding="utf-8") for page, file in MIRRORS.items()}
    pages |= {f"reference/{name}.md": package_page(name, exports) for name, exports in packages().items()}
    for page, text in pages.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links to files of the repository lead to the page that shows the file."""
    at = page.file.src_uri
    source = Path(MIRRORS.get(at, f"docs/{at}"))
    if at.startswith("results/") and source.name == "table.md":  # `study table` writes a table alone
        markdown = f"# Table of {source.parent.name}\n\n{markdown}"

    def rewritten(found: re.Match[str]) -> str:
        text, target, anchor = found[1], found[2], found[3] or ""
        file = Path(os.path.normpath(ROOT / source.parent / target))
        if "://" in target or not file.exists() or not file.is_relative_to(ROOT):
            return found[0]
        if (shown := shown_at(file)) is not None:
            return f"[{text}]({relpath(shown, os.path.dirname(at) or '.')}{'' if '#' in shown else anchor})"
        return f"[{text}]({config.repo_url}/tree/HEAD/{file.relative_to(ROOT)})" if config.repo_url else text

    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)\s#]+)(#[^)\s]*)?\)", rewritten, markdown)


def shown_at(file: Path) -> str | None:
    """The page of the site, with its anchor where it is a part, that shows a file of the repository."""
    path = file.relative_to(ROOT).as_posix()
    for page, mirrored in MIRRORS.items():
        if path in (mirrored, mirrored.rpartition("/")[0]):
            return page
    if path.startswith("docs/") and file.is_file():
        return path.removeprefix("docs/")
    if path.startswith("configs/") and file.suffix == ".yaml":
        return f"{CONFIGS}#{slug(path)}"
    return CONFIGS if path == "configs" or path.startswith("configs/") else None


def slug(heading: str) -> str:
    """The anchor of a heading, as the extension toc makes it."""
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


@cache
def packages() -> dict[str, tuple[str, ...]]:
    """Each package that exports names, and the names: `__all__` of its __init__.pyi."""
    found = {}
    for file in sorted((ROOT / "lit_safety").glob("*/__init__.pyi")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and any(
                isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets
            ):
                found[f"lit_safety.{file.parent.name}"] = tuple(ast.literal_eval(node.value))
    return found


def package_page(name: str, exports: tuple[str, ...]) -> str:
    """The page of a package: its own docstring, then every name that it exports."""
    members = "".join(f"        - {export}\n" for export in exports)
    return f"# {name}\n\n::: {name}\n    options:\n      members:\n{members}"


def configs_page() -> str:
    """Every shipped YAML. Each of them explains its keys."""
    text = "# Configs\n\nEach file explains its keys. Later `--config` files and options override earlier ones.\n"
    for file in sorted((ROOT / "configs").rglob("*.yaml"), key=lambda path: (len(path.parts), path)):
        text += f"\n## {file.relative_to(ROOT)}\n\n```yaml\n{file.read_text(encoding='utf-8')}```\n"
    return text


@cache
def commands_page() -> str:
    """The help of every command and of its subcommands."""
    overview = help_of()
    text = f"# Commands\n\n```text\n{overview}```\n"
    for command in re.findall(r"^  ([a-z][\w-]+) ", overview.partition("commands:")[2], re.MULTILINE):
        shown = help_of(command)
        text += f"\n## {command}\n\n```text\n{shown}```\n"
        below = shown.partition("Available subcommands:")[2]
        for part in re.findall(r"^    ([a-z][\w-]+)", below, re.MULTILINE):
            text += f"\n### {command} {part}\n\n```text\n{help_of(command, part)}```\n"
    return text


def help_of(*words: str) -> str:
    """What `python -m lit_safety WORDS --help` prints, 100 columns wide."""
    from lit_safety.__main__ import main

    printed = io.StringIO()
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100"
    try:
        with redirect_stdout(printed):
            status: Any = main([*words, "--help"])
    except SystemExit as ended:
        status = ended.code
    finally:
        os.environ.pop("COLUMNS")
        if columns is not None:
            os.environ["COLUMNS"] = columns
    if status:
        raise RuntimeError(f"`{' '.join(words)} --help` ended with status {status}")
    return printed.getvalue()
