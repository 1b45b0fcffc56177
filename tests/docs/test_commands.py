"""Every command in the documents goes through the real command line, up to where it would begin to work."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from lit_safety.__main__ import OTHER_COMMANDS, TRAINER_COMMANDS, main
from lit_safety.cli.commands import COMMANDS
from tests.helpers.documents import ROOT, commands, documents, files

PAGES = documents()


def shape(words: list[str]) -> tuple[str, ...]:
    """What is parsed: the command, the names of its options, and the files behind `--config`."""
    return tuple(w for i, w in enumerate(words) if i < 2 or w.startswith("-") or words[i - 1] == "--config")


def first_of_each_shape() -> list[tuple[Path, list[str]]]:
    """Of commands that differ in values only, the first one."""
    found: dict[tuple[str, ...], tuple[Path, list[str]]] = {}
    for page in PAGES:
        for words in commands(page):
            found.setdefault(shape(words), (page, words))
    return list(found.values())


@pytest.mark.parametrize(
    ("page", "words"),
    [pytest.param(page, words, id=f"{page.stem}: {' '.join(words)}") for page, words in first_of_each_shape()],
)
def test_it_is_understood(
    page: Path, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--print_config` goes through the whole parser; it ends the process with 0, an error with 2."""
    for name, text in files(page).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    for folder in ("configs", "data"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    if "my-run/fit.yaml" in words:  # the file that `init` writes, and what a run of it leaves
        assert main(["init", "my-run", "--model", "sd15"]) == 0
        (tmp_path / "my-run" / "runs" / "latest" / "adapter").mkdir(parents=True)
    with pytest.raises(SystemExit) as ended:
        main([*words, "--print_config"])
    assert ended.value.code == 0, capsys.readouterr().err


def test_every_command_is_shown_somewhere() -> None:
    asked = [words for page in PAGES for words in commands(page)]
    shown = {" ".join(words[:2]) if isinstance(COMMANDS.get(words[0]), dict) else words[0] for words in asked}
    every = set(TRAINER_COMMANDS) | {name for name in OTHER_COMMANDS if not isinstance(COMMANDS[name], dict)}
    every |= {f"{name} {part}" for name, parts in COMMANDS.items() if isinstance(parts, dict) for part in parts}
    assert every - shown == set()


def test_every_config_file_that_a_document_names_is_shipped() -> None:
    for page in PAGES:
        for named in re.findall(r"\bconfigs/[\w/]+\.yaml", page.read_text(encoding="utf-8")):
            assert (ROOT / named).is_file(), f"{page.name}: {named}"


def test_the_demos_two_commands_are_those_that_make_runs() -> None:
    """READY is empty, so that nothing is installed; -n prints what would be run."""
    shown = subprocess.run(
        ["make", "-n", "demo", "READY=", "PY=python"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    run = [shlex.split(line.partition("-m lit_safety ")[2]) for line in shown.splitlines() if "-m lit_safety" in line]
    assert run == commands(ROOT / "docs" / "tutorials" / "demo.md")
