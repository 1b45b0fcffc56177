"""A tokenizer is read whole or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, CLIPTokenizer, GemmaTokenizer, T5Tokenizer

from lit_safety.core.errors import UserError
from lit_safety.core.tokenizers import check_tokenizer, check_tokenizer_files
from tests.helpers.tiny_pipelines import clip_tokenizer

CONFIG = {"model_type": "clip_text_model", "vocab_size": 64, "max_position_embeddings": 16, "eos_token_id": 1}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny CLIP's tokenizer as `save_pretrained` writes it."""
    clip_tokenizer(tmp_path / "words").save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def in_old_files(folder: Path) -> None:
    """As releases of transformers before 5 wrote it, and as most published pipelines have it."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n")


def checked(folder: Path, config: dict[str, Any] = CONFIG) -> Any:
    check_tokenizer_files(folder, CLIPTokenizer)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    check_tokenizer(tokenizer, folder, config)
    return tokenizer


def test_new_and_old_files_read_the_same(folder: Path):
    first = checked(folder)("a red cat")["input_ids"]
    in_old_files(folder)
    assert checked(folder)("a red cat")["input_ids"] == first
    assert len(set(first)) > 4


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"])
@pytest.mark.parametrize("how", ["missing", "empty", "pointer", "of macOS"])
def test_a_file_that_is_not_whole_is_named(folder: Path, name: str, how: str):
    if name in ("vocab.json", "merges.txt"):
        in_old_files(folder)
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if how == "empty":
        (folder / name).touch()
    elif how == "pointer":
        (folder / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    elif how == "of macOS":
        (folder / f"._{name}").write_bytes(content)
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        checked(folder)


@pytest.mark.parametrize(
    ("kind", "named"),
    [(T5Tokenizer, "spiece.model"), (GemmaTokenizer, "tokenizer.json"), (AutoTokenizer, "tokenizer.json")],
)
def test_every_kind_of_tokenizer_needs_its_vocabulary(folder: Path, kind: Any, named: str):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=named):
        check_tokenizer_files(folder, kind)
    (folder / "tokenizer.model").touch()
    (folder / "spiece.model").write_bytes(b"x")
    check_tokenizer_files(folder, kind)


def edited(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    stated = json.loads((folder / "tokenizer.json").read_text())
    edit(stated)
    (folder / "tokenizer.json").write_text(json.dumps(stated))


def only_special(stated: dict[str, Any]) -> None:
    vocabulary = stated["model"]["vocab"]
    stated["model"]["vocab"] = {token: number for token, number in vocabulary.items() if token.startswith("<|")}


def no_end(stated: dict[str, Any]) -> None:
    del stated["model"]["vocab"]["<|endoftext|>"]
    stated["added_tokens"] = [one for one in stated["added_tokens"] if one["content"] != "<|endoftext|>"]


def unreachable(stated: dict[str, Any]) -> None:
    """Words that no merge leads to, as where merges.txt belongs to another model."""
    stated["model"]["vocab"] |= {f"word{number}</w>".replace("0", "o"): 40 + number for number in range(1, 20)}
    stated["model"]["vocab"] = {token: n for token, n in stated["model"]["vocab"].items() if len(token) > 5 or n < 2}


@pytest.mark.parametrize("edit", [only_special, no_end, unreachable])
def test_a_damaged_vocabulary_is_refused(folder: Path, edit: Callable[[dict[str, Any]], object]):
    edited(folder, edit)
    with pytest.raises(UserError, match=str(folder)):
        checked(folder)


@pytest.mark.parametrize(
    "config",
    [
        {"vocab_size": 20},  # fewer rows than tokens
        {"vocab_size": 49408, "eos_token_id": 49407},  # another model's
        {"vocab_size": 49408, "eos_token_id": 2},  # the same, by a configuration of old
        {"eos_token_id": 5},  # ends elsewhere
        {"max_position_embeddings": 8},  # reads less
    ],
)
def test_a_tokenizer_of_another_model_is_refused(folder: Path, config: dict[str, Any]):
    with pytest.raises(UserError, match=str(folder)):
        checked(folder, CONFIG | config)
    with pytest.raises(UserError, match=str(folder)):
        checked(folder, {"model_type": "clip", "text_config": CONFIG | config})


@pytest.mark.parametrize("config", [{}, {"eos_token_id": 2}, {"vocab_size": 150}, {"eos_token_id": None}])
def test_padded_embeddings_and_configurations_of_old_are_right(folder: Path, config: dict[str, Any]):
    checked(folder, CONFIG | config)


def test_without_a_length_the_settings_are_named(folder: Path):
    file = folder / "tokenizer_config.json"
    stated = json.loads(file.read_text())
    del stated["model_max_length"]
    file.write_text(json.dumps(stated))
    with pytest.raises(UserError, match=r"tokenizer_config\.json"):
        checked(folder)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.8])
def test_merges_that_are_cut_short_are_refused(folder: Path, kept: float, old: bool):
    """Then words fall into pieces; letters, which most of a small vocabulary are, are still read."""
    stated = json.loads((folder / "tokenizer.json").read_text())
    merges = []
    for word in ("red", "blue", "cat", "house", "gun", "and", "with", "ant", "near", "bus"):
        for place in range(1, len(word)):
            pair = [word[:place], word[place] + ("</w>" if place == len(word) - 1 else "")]
            merges += [] if pair in merges else [pair]
    names = dict.fromkeys("".join(pair) for pair in merges)
    stated["model"]["vocab"] |= {name: 100 + number for number, name in enumerate(names)}
    stated["model"]["merges"] = merges
    (folder / "tokenizer.json").write_text(json.dumps(stated))
    checked(folder, {})
    stated["model"]["merges"] = merges[: int(kept * len(merges))]
    (folder / "tokenizer.json").write_text(json.dumps(stated))
    if old:
        in_old_files(folder)
        lines = map(" ".join, stated["model"]["merges"])
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]))
    with pytest.raises(UserError, match="tokenizer") as caught:
        checked(folder, {})
    assert str(folder) in str(caught.value)
