"""Texts that people write are read as UTF-8, and any other encoding is one line with the file's name, everywhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lit_safety.__main__ import main
from lit_safety.core.errors import UserError
from lit_safety.core.tables import read_csv
from lit_safety.core.text import NotUtf8, decode_text, read_text
from lit_safety.data.convert.published import JsonLines
from lit_safety.data.format.manifest import load_manifest
from lit_safety.data.format.sample import parse_metadata
from lit_safety.drawing.prompts import read_prompts
from lit_safety.evaluation.compare import compare
from lit_safety.judges.load import judge_from_file, load_judge
from lit_safety.judges.vlm import read_template as read_question
from lit_safety.merging.calibration import _opened
from lit_safety.study.plan import load_study
from lit_safety.users.embeddings import read_template

OTHERS = ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252", "latin-1"]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "marked"])
def test_utf_8_is_read_with_a_mark_and_without(tmp_path: Path, mark: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(mark + "Bär, 画像\r\nzwei\n".encode())
    assert read_text(tmp_path / "a.txt") == "Bär, 画像\r\nzwei\n"
    assert decode_text(mark, "a") == ""


@pytest.mark.parametrize("encoding", OTHERS)
def test_what_is_not_utf_8_is_named_with_what_to_do(encoding: str) -> None:
    with pytest.raises(NotUtf8, match=r"here\.csv: .*iconv -f") as caught:
        decode_text("one\nzwei Bären\n".encode(encoding), "here.csv")
    if encoding in ("cp1252", "latin-1"):
        assert "0xe4 in line 2" in str(caught.value)


READERS: dict[str, Callable[[Path], object]] = {
    "table": lambda file: read_csv(str(file), ("prompt",)),
    "rows next to images": lambda file: JsonLines(file, ()),
    "prompt set": read_prompts,
    "calibration prompts": lambda file: _opened(file).__enter__(),
    "judge": judge_from_file,
    "study": lambda file: load_study(str(file)),
    "profile's template": read_template,
    "question": lambda file: read_question(str(file), "vlm_prompt.txt"),
    "metrics": lambda file: compare([str(file), str(file)]),
    "manifest": lambda file: load_manifest(file.parent, file.name),
    "judge's folder": lambda file: load_judge(str(file.rename(file.parent / "config.json").parent)),
    "metadata": lambda file: parse_metadata(file.read_bytes(), str(file)),
}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "cp1252"])
@pytest.mark.parametrize("reader", READERS)
def test_every_reader_names_the_file(tmp_path: Path, reader: str, encoding: str) -> None:
    file = tmp_path / "own.yaml"
    file.write_bytes("class_path: Bär\nprompt,kind\n".encode(encoding))
    with pytest.raises(UserError, match=r"(own\.yaml|config\.json).*(UTF-16|UTF-8).*iconv") as caught:
        READERS[reader](file)
    assert "\n" not in str(caught.value)


CONFIG = "data:\n  class_path: lit_safety.data.PreferenceDataModule\n# Bär\n"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "cp1252"])
@pytest.mark.parametrize("where", ["--config", "--data"])
def test_a_config_in_another_encoding_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], encoding: str, where: str
) -> None:
    """A whole config, and a part of one in a file of its own."""
    file = tmp_path / "own.yaml"
    text = CONFIG if where == "--config" else "class_path: lit_safety.data.PreferenceDataModule\n# Bär\n"
    file.write_bytes(text.encode(encoding))
    method = [] if where == "--config" else ["--config", "scdpo.yaml"]
    assert main(["fit", *method, where, str(file)]) == 2
    said = capsys.readouterr().err
    assert "own.yaml" in said
    assert "iconv" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("content", [b"", b"# nothing\n", b"\xef\xbb\xbf", b"just words\n", b"- 1\n", b"a: [\n"])
def test_a_config_that_says_nothing_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    file = tmp_path / "own.yaml"
    file.write_bytes(content)
    assert main(["fit", "--config", str(file)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "own.yaml" in said


def test_a_config_with_a_mark_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The mark is not part of the first key."""
    file = tmp_path / "own.yaml"
    file.write_bytes(b"\xef\xbb\xbfno_such_key: 1\n")
    assert main(["fit", "--config", str(file)]) == 2
    assert "'no_such_key'" in capsys.readouterr().err.replace("`", "'")


def test_metadata_with_a_mark_is_read() -> None:
    data = {"prompt": "Bär", "prompt_kind": "clean", "order": "safety", "harmful": {"chosen": None, "rejected": None}}
    raw = b"\xef\xbb\xbf" + json.dumps(data, ensure_ascii=False).encode()
    assert parse_metadata(raw, "here").prompt == "Bär"
