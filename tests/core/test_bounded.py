"""YAML and JSON that expand beyond any memory, and paths that are not files, are refused quickly."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import yaml

from lit_safety.__main__ import main
from lit_safety.core.errors import UserError
from lit_safety.core.text import check_values, check_words, check_yaml, load_json, load_yaml


def bomb(levels: int = 9) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels)]
    return "\n".join(lines) + "\n"


MERGED = "\n".join(
    ["a0: &a0 {k: 1, l: 2, m: 3}", *(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 9))]
)
BAD = {
    "aliases": bomb(),
    "merge keys": MERGED,
    "flow": f"a: {'[' * 50_000}{']' * 50_000}",
    "block": "\n".join(" " * i + "a:" for i in range(150)),
    "itself": f"a: &a [{'x, ' * 100} *a]",
}


@pytest.mark.parametrize("text", BAD.values(), ids=BAD)
def test_yaml_without_bounds_is_refused_at_once(text: str) -> None:
    begun = time.monotonic()
    with pytest.raises(UserError, match=r"^some\.yaml: "):
        load_yaml(text, "some.yaml")
    assert time.monotonic() - begun < 5


def test_ordinary_aliases_and_long_lists_are_read() -> None:
    text = "base: &base {a: 1, b: [1, 2, 3]}\nother: {<<: *base, c: *base}\nlong: [" + "1, " * 50_000 + "1]\n"
    check_yaml(text)
    said = load_yaml(text)
    assert said["other"] == {"a": 1, "b": [1, 2, 3], "c": {"a": 1, "b": [1, 2, 3]}}
    assert len(said["long"]) == 50_001


@pytest.mark.parametrize("text", ["a: 2026-13-45", "a: " + "9" * 6000], ids=["date", "digits"])
def test_a_value_that_cannot_be_is_a_yaml_error(text: str) -> None:
    with pytest.raises(yaml.YAMLError):
        load_yaml(text)


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 6000, "{", '"\ud800'], ids=["deep", "digits", "cut", "letter"])
def test_json_without_bounds_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 (what all callers catch)
        load_json(text)


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "fifo")
    return tmp_path / "fifo"


def test_a_fifo_is_refused_wherever_it_is_named(fifo: Path, tmp_path: Path) -> None:
    for words in (["--prompts", str(fifo)], [f"--prompts={fifo}"], ["x", str(fifo)], ["--config", str(fifo)]):
        with pytest.raises(UserError, match="fifo is neither a file nor a folder"):
            check_words(words)
    (tmp_path / "link").symlink_to(fifo)
    for values in ({"a": {"b": [str(tmp_path / "link")]}}, {"a": str(tmp_path)}, {"a": tmp_path}):
        with pytest.raises(UserError, match=r"^a"):
            check_values(values)
    check_values({"a": str(Path(__file__).parent), "b": "no/such/file", "c": "a red cat", "d": "x" * 10_000, "e": None})
    check_words(["--out", os.devnull])


def test_devices_are_refused() -> None:
    with pytest.raises(UserError, match="--prompts: /dev/zero"):
        check_words(["--prompts", "/dev/zero"])


@pytest.mark.parametrize("command", [["evaluate", "--config"], ["study", "run"], ["merge", "--config"]])
@pytest.mark.parametrize("what", ["bomb", "deep", "fifo"])
def test_commands_say_one_line(
    command: list[str], what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], fifo: Path
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(BAD["flow"] if what == "deep" else bomb())
    assert main([*command, str(fifo if what == "fifo" else file)]) == 2
    complaints = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(complaints) == 1
    assert ("fifo" if what == "fifo" else "config.yaml") in complaints[0]


def test_a_judge_s_file_is_bounded_too(tmp_path: Path) -> None:
    from lit_safety.judges.load import judge_from_file

    (tmp_path / "judge.yaml").write_text(bomb())
    with pytest.raises(UserError, match=r"judge\.yaml"):
        judge_from_file(tmp_path / "judge.yaml")


def test_a_model_card_of_any_content_is_read_at_once(tmp_path: Path) -> None:
    from lit_safety.merging.experts import base_model

    card = tmp_path / "README.md"
    for text in (
        "---\n" + "base_model: x\n" * 20_000,  # the front matter never ends: each line may be the one
        "---\n" + "\n" * 200_000 + "base_model: x",
        "---\nbase_model:" + " " * 200_000 + "\n---\n",
    ):
        card.write_text(text)
        begun = time.monotonic()
        assert base_model(tmp_path) is None
        assert time.monotonic() - begun < 1
    card.write_text("---\r\ntags: [a]\r\nbase_model: 'some/one'\r\n---\r\n# A card\nbase_model: other\n")
    assert base_model(tmp_path) == "some/one"


def test_a_fence_of_any_content_is_taken_off_at_once() -> None:
    from lit_safety.core.http import unfenced

    begun = time.monotonic()
    unfenced("```" + " \n" * 200_000 + "x")
    unfenced("```json" + "\n" * 200_000 + "```")
    assert time.monotonic() - begun < 1
    assert json.loads(unfenced('  ```json\n{"a": 1}\n```  ')) == {"a": 1}


@pytest.mark.parametrize(
    "words",
    [
        ["evaluate", "--pipeline", "p", "--prompts", "p", "--judge", "j", "--out", "o", "--processes", "1000000000"],
        ["evaluate", "--pipeline", "p", "--prompts", "p", "--judge", "j", "--out", "o", "--workers", "1000000000"],
        ["study", "run", "s", "--processes", "1000000000"],
        ["toyworld", "build", "--processes", "1000000000"],
        ["toyworld", "build", "--scenes", "1000000000"],
        ["users", "sample", "o", "--count", "1000000000"],
    ],
    ids=lambda words: " ".join([words[0], words[-2]]),
)
def test_numbers_beyond_any_machine_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert "1000000000" in capsys.readouterr().err
