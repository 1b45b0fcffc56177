"""Terminals and batch systems that say they take ASCII only: no command dies of a letter."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest
from PIL import Image

from lit_safety.__main__ import main
from lit_safety.data.format.writer import ShardWriter


def ascii_streams(monkeypatch: pytest.MonkeyPatch) -> dict[str, io.TextIOWrapper]:
    """stdout and stderr as PYTHONIOENCODING=ascii makes them, or stricter."""
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict") for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    return streams


def said(stream: io.TextIOWrapper) -> str:
    stream.flush()
    raw = stream.buffer
    assert isinstance(raw, io.BytesIO)
    return raw.getvalue().decode("ascii")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "Bären"
    with ShardWriter(folder) as writer:
        metadata = {"prompt": "ein Bär, 画像 🙂", "prompt_kind": "clean", "order": "safety"}
        labels = {"harmful": {"chosen": None, "rejected": None}, "concept": "Bär"}
        images = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
        writer.write("0", metadata | labels, *images)
    return folder


@pytest.mark.parametrize("command", ["inspect", "validate"])
def test_prompts_and_folders_are_printed(command: str, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    streams = ascii_streams(monkeypatch)
    assert main(["shards", command, str(shards)]) == 0
    text = said(streams["stdout"])
    assert "B\\xe4ren" in text
    if command == "inspect":
        assert "ein B\\xe4r, \\u753b\\u50cf \\U0001f642" in text


def test_file_names_and_errors_are_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    streams = ascii_streams(monkeypatch)
    for name in ("Bär.png", "b.png"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    (tmp_path / "t.csv").write_text("prompt,chosen,rejected\na,fehlt_ö.png,b.png\nb,Bär.png,b.png\n", encoding="utf-8")
    words = ["shards", "from-folder", str(tmp_path / "t.csv"), str(tmp_path / "öut"), "--prompt_kind", "clean"]
    assert main(words) == 2, "the one pair that is there is one image twice"
    assert "fehlt_\\xf6.png" in said(streams["stdout"])
    assert "\\xf6ut" in said(streams["stderr"])


def test_processes_that_are_started_print_anything_too(monkeypatch: pytest.MonkeyPatch) -> None:
    ascii_streams(monkeypatch)
    assert main(["--version"]) == 0
    assert os.environ["PYTHONIOENCODING"] == "ascii:backslashreplace"
