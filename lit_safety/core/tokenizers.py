"""A tokenizer is read whole or refused.

If a folder holds no vocabulary, transformers makes a tokenizer of two words and does not report it: every prompt then
becomes the same tokens. So we check its files first. Then it must read the words of its own vocabulary, and fit the
text encoder that gets its tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_safety.core.errors import UserError
from lit_safety.core.weights import is_hidden, is_pointer

#: The whole tokenizer in one file.
WHOLE = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
#: Vocabularies of tokenizers whose class does not name a file.
OTHER_VOCABULARIES = ("tokenizer.model", "tekken.json")
#: How many embeddings may lack a token: networks are padded to multiples of 64 or 128, large ones to more.
PADDING, PADDING_SHARE = 128, 0.1
#: How many words of its vocabulary a tokenizer is asked for.
PROBES = 32
#: The share of longer words of a BPE vocabulary that may lack a merge: a few are added by hand.
LOST_SHARE = 0.02
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
#: A mark such as `</think>`, which merges do not make: some tokenizers do not list it among their special tokens.
_MARK = re.compile(r"<[^<>\s]+>")
#: What a word begins or ends with in the vocabularies of byte-level BPE, SentencePiece and CLIP.
MARKS = ("\u0120", "\u2581", "</w>")
#: transformers uses this as the end token of CLIP models whose configuration was written wrongly.
OLD_CLIP_END = 2


def check_tokenizer_files(folder: Path, kind: type, settings: bool = True) -> None:
    """Refuse a folder without the vocabulary and the settings of a tokenizer of the class ``kind``.

    Args:
        folder: the tokenizer's.
        kind: a class of transformers. One that chooses another class, such as `AutoTokenizer`, does not name files.
        settings: whether it needs `tokenizer_config.json`. A caller that sets the length of texts and masks them does
            not.

    Raises:
        UserError: a file is missing, empty or a pointer of git LFS; names it.
    """
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    there = {name for name in names if not is_hidden(name)}
    stated: Mapping[str, str] = getattr(kind, "vocab_files_names", {})
    own = [name for name in stated.values() if name != WHOLE]
    several = all(name in there for name in own) if own else any(name in there for name in OTHER_VOCABULARIES)
    if not stated:  # the settings choose the class
        several = several or {"vocab.json", "merges.txt"} <= there or bool(there & {"vocab.txt", "spiece.model"})
    if WHOLE not in there and not several:
        missing = " and ".join(name for name in own if name not in there)
        raise UserError(
            f"{folder / WHOLE} is missing{f', and so is {missing}' if missing else ''}: without a vocabulary every "
            "prompt would read the same; copy the tokenizer's whole folder, or fetch the model again"
        )
    if settings and SETTINGS not in there:
        raise UserError(
            f"{folder / SETTINGS} is missing: it says how long a prompt may be and what it is padded with; copy the "
            "tokenizer's whole folder, or fetch the model again"
        )
    for name in sorted(there & {WHOLE, SETTINGS, *own}):
        if is_pointer(folder / name):
            raise UserError(f"{folder / name} is a pointer of git LFS: run `git lfs pull`, or copy the file")
        if not (folder / name).stat().st_size:
            raise UserError(f"{folder / name} is empty: copy it again")
    if SETTINGS in there:
        read_config(folder / SETTINGS)


def check_tokenizer(tokenizer: Any, folder: Path | str, encoder: Mapping[str, Any] | None = None) -> None:
    """Refuse a tokenizer that does not read words, or whose tokens are not those of its text encoder.

    Args:
        tokenizer: of transformers, loaded.
        folder: where it comes from, for messages.
        encoder: the text encoder's `config.json`; None: it is not compared.

    Raises:
        UserError: says what differs.
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    _check_words(tokenizer, vocabulary, folder)
    _check_merges(tokenizer, folder)
    if encoder is None:
        return
    inner = encoder.get("text_config")
    stated = {**encoder, **(inner if isinstance(inner, dict) else {})}
    rows = stated.get("vocab_size")
    if isinstance(rows, int):
        _check_size(tokenizer, vocabulary, rows, folder)
    if "clip" in str(stated.get("model_type") or encoder.get("model_type")):
        _check_clip(tokenizer, stated, folder)


def _check_words(tokenizer: Any, vocabulary: Mapping[str, int], folder: Path | str) -> None:
    special = set(tokenizer.all_special_tokens)
    ordinary = [token for token in vocabulary if token not in special]
    marked = [token for token in ordinary if token != (word := _word(token)) and _is_plain(word)]
    words = sorted(marked or [token for token in ordinary if _is_plain(token)], key=vocabulary.__getitem__)
    if not words and len(ordinary) >= 16:  # in an alphabet that is not known here
        return
    probes = words[:: max(1, len(words) // PROBES)]
    read = sum(_reads(tokenizer, _word(token), vocabulary[token]) for token in probes)
    if not probes or read < len(probes) / 2:
        raise UserError(
            f"{folder}: its tokenizer reads {read} of {len(probes)} words of its own vocabulary ({len(vocabulary)} "
            "tokens), so prompts would read alike: its files are damaged or do not belong together; copy them again"
        )


def _check_merges(tokenizer: Any, folder: Path | str) -> None:
    """Refuse a BPE vocabulary whose merges do not make its tokens: long words would be split into letters."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = {} if backend is None else json.loads(backend.to_str())["model"]
    if model.get("type") != "BPE" or model.get("ignore_merges"):
        return
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    prefix, end = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    made = {one + other.removeprefix(prefix) for one, other in pairs}
    own = set(tokenizer.get_added_vocab()) | set(tokenizer.all_special_tokens)
    longer = [
        token
        for token in model["vocab"]
        if len(token.removesuffix(end)) > 1
        and token not in own
        and not _BYTE.fullmatch(token)
        and not _MARK.fullmatch(token)
    ]
    lost = [token for token in longer if token not in made]
    if len(lost) > LOST_SHARE * len(longer):
        raise UserError(
            f"{folder}: {len(lost)} of the {len(longer)} longer words of its tokenizer's vocabulary have no merge, "
            f"such as {lost[-1]!r}, so they would be read as several tokens: its merges are cut short; copy its "
            "files again"
        )


def _word(token: str) -> str:
    for mark in MARKS:
        token = token.removeprefix(mark).removesuffix(mark)
    return token


def _is_plain(word: str) -> bool:
    return word.isascii() and word.isalnum()


def _reads(tokenizer: Any, word: str, number: int) -> bool:
    return any(number in tokenizer(text, add_special_tokens=False)["input_ids"] for text in (word, f" {word}"))


def _check_size(tokenizer: Any, vocabulary: Mapping[str, int], rows: int, folder: Path | str) -> None:
    added = set(tokenizer.get_added_vocab())
    used = {number for token, number in vocabulary.items() if token not in added}
    # Of the special tokens only those that stand around a text: others, as for masking, may be added without an
    # embedding.
    used |= {*tokenizer("")["input_ids"], *([] if tokenizer.pad_token_id is None else [tokenizer.pad_token_id])}
    if max(used, default=0) >= rows:
        raise UserError(
            f"{folder}: its tokenizer has the token {max(used)}, and its text encoder embeds {rows} tokens: it belongs "
            "to another model; copy the tokenizer of this one"
        )
    if rows - len(vocabulary) > max(PADDING, PADDING_SHARE * rows):
        raise UserError(
            f"{folder}: its tokenizer has {len(vocabulary)} tokens, and its text encoder embeds {rows}: the vocabulary "
            "is damaged, or belongs to another model; copy the tokenizer of this one"
        )


def _check_clip(tokenizer: Any, encoder: Mapping[str, Any], folder: Path | str) -> None:
    rows, places = encoder.get("vocab_size", 0), encoder.get("max_position_embeddings")
    end, stated = tokenizer.eos_token_id, encoder.get("eos_token_id")
    base = getattr(tokenizer, "backend_tokenizer", None)
    if end is None or (base is not None and tokenizer.eos_token not in base.get_vocab(with_added_tokens=False)):
        raise UserError(
            f"{folder}: its vocabulary lacks the end token {tokenizer.eos_token!r}, at which CLIP reads a prompt; "
            "copy the tokenizer again"
        )
    if isinstance(stated, int) and stated != OLD_CLIP_END and stated < rows and end != stated:
        raise UserError(
            f"{folder}: its end token {tokenizer.eos_token!r} is number {end}, and the text encoder's configuration "
            f"says {stated}: they belong to two models, or the vocabulary is damaged; copy both again"
        )
    if isinstance(places, int) and tokenizer.model_max_length > places:
        raise UserError(
            f"{folder}: {SETTINGS} gives {_length(tokenizer)} as `model_max_length`, and the text encoder reads "
            f"{places} tokens: set it to {places}"
        )


def _length(tokenizer: Any) -> str:
    longest = tokenizer.model_max_length
    return "nothing" if longest > 1 << 62 else str(longest)


def read_config(config: Path) -> dict[str, Any]:
    """A small JSON file of settings.

    Raises:
        UserError: it is not a JSON object.
    """
    try:
        stated = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{config} is not readable JSON: {error}") from error
    if not isinstance(stated, dict):
        raise UserError(f"{config} is not a JSON object")
    return stated
