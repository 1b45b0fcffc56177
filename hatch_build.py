"""What pyproject.toml cannot say: a README whose links lead to the repository, and configs within the package."""

from __future__ import annotations

import re
import subprocess
from email import message_from_string
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.plugin.interface import MetadataHookInterface


def long_description(text: str, repository: str | None) -> str:
    """The README with its relative links led to ``repository``; without one, images go and links become text."""

    def rewritten(found: re.Match[str]) -> str:
        image, label, target = found.groups()
        if repository is None:
            return "" if image else label
        return f"{image}[{label}]({repository}/{'raw' if image else 'blob'}/HEAD/{target})"

    return re.sub(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)\s]+)\)", rewritten, text).lstrip()


def web_address(remote: str) -> str | None:
    """The page of a git remote, without anybody's name or password; None: it is a folder, or has no page.

    >>> web_address("git@git.example.org:someone/lit-safety.git")
    'https://git.example.org/someone/lit-safety'
    """
    found = re.fullmatch(
        r"(?:https://(?:[^@/]*@)?|ssh://git@|git@)([\w.-]+\.\w+)[/:]([\w./-]+?)(?:\.git)?/?", remote.strip()
    )
    return None if found is None else f"https://{found[1]}/{found[2]}"


def repository(root: Path, urls: dict[str, str]) -> str | None:
    """Where the files lie that the README shows: `[project.urls]`, or where this clone came from."""
    if "Repository" in urls:
        return urls["Repository"].rstrip("/")
    if not (root / ".git").exists():
        return None
    asked = ["git", "-C", str(root), "remote", "get-url", "origin"]
    try:
        return web_address(subprocess.run(asked, capture_output=True, text=True, check=False).stdout)
    except OSError:  # no git
        return None


class CustomMetadataHook(MetadataHookInterface):
    """Writes the dynamic field `readme`."""

    def update(self, metadata: dict[str, Any]) -> None:
        root = Path(self.root)
        packed = root / "PKG-INFO"
        if packed.is_file():  # a source archive, whose builder knew the repository
            text = str(message_from_string(packed.read_text(encoding="utf-8")).get_payload())
        else:
            readme = (root / "README.md").read_text(encoding="utf-8")
            text = long_description(readme, repository(root, metadata.get("urls", {})))
        metadata["readme"] = {"content-type": "text/markdown", "text": text}


class CustomBuildHook(BuildHookInterface[Any]):
    """Puts the configs into a wheel; an editable install reads those of the checkout."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "standard":
            build_data["force_include"][str(Path(self.root) / "configs")] = "lit_safety/configs"
