"""The examples in data/README.md are what the code reads and writes; so are the commands of the pages on shards."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lit_safety.cli import commands
from lit_safety.data.format.manifest import Manifest, load_manifest
from lit_safety.data.format.sample import PairMetadata, parse_metadata
from tests.helpers.documents import ROOT
from tests.helpers.documents import blocks as blocks_of
from tests.helpers.documents import commands as commands_of
from tests.helpers.pair_shards import make_image

README = ROOT / "data" / "README.md"


def blocks(language: str) -> list[str]:
    return blocks_of(README, language)


def test_the_sample_is_read_in_full() -> None:
    written = json.loads(blocks("json")[0])
    parsed = parse_metadata(blocks("json")[0].encode(), "README")
    assert parsed.to_dict() == written
    assert set(written) == {field.name for field in dataclasses.fields(PairMetadata)} - {"images"}


def test_the_group_is_read_in_full() -> None:
    written = json.loads(blocks("json")[2])
    parsed = parse_metadata(blocks("json")[2].encode(), "README")
    assert parsed.to_dict() == written
    assert parsed.sides == (1, 0)


def test_the_manifest_has_the_fields_that_are_written() -> None:
    shown = json.loads(blocks("json")[1])
    assert list(shown) == list(Manifest(()).to_dict())
    assert set(shown["shardlist"][0]) == {"url", "nsamples", "bytes", "sha256", "classes"}


def test_the_writer_is_used_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"image": make_image(1), "other": make_image(2)}
    exec(blocks("python")[0], names)
    assert load_manifest("data/mine/train").nsamples == 1


PAGES = [README, *(ROOT / "docs" / "how-to" / f"{name}.md" for name in ("shards", "make-pairs", "costs", "faster"))]
COMMANDS = [words[1:] for page in PAGES for words in commands_of(page) if words[0] == "shards"]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_is_understood(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parsed as on the command line, with the function replaced by one that notes the call."""
    called: list[dict[str, Any]] = []
    function = commands._load(commands.COMMANDS["shards"][words[0]])  # type: ignore[index]

    @functools.wraps(function)
    def noted(*_: Any, **given: Any) -> None:
        called.append(given)

    monkeypatch.setattr(commands, "_load", lambda _: noted)
    monkeypatch.setattr("lit_safety.judges.clip.Clip", lambda *_: SimpleNamespace(settings={}))  # of the hub
    commands.run_command(["shards", *words])
    (given,) = called
    named = {word[2:].split(".")[0] for word in words if word.startswith("--")}
    assert all(given[name] is not None for name in named)


def test_commands_of_every_kind_are_shown() -> None:
    shown = {words[0] for words in COMMANDS}
    assert set(commands.COMMANDS["shards"]) == shown
