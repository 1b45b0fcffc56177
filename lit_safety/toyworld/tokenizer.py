"""A genuine CLIPTokenizer whose byte-pair merges make each word of the toy world one token."""

import json
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from lit_safety.toyworld.captions import vocabulary
from lit_safety.toyworld.folders import swap_in

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

LENGTH = 16
"""Tokens of a prompt, start and end included."""
START, END = "<|startoftext|>", "<|endoftext|>"


def learn_merges(words: tuple[str, ...]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent first, until every word is one symbol (ties by alphabet)."""
    split = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    merges: list[tuple[str, str]] = []
    while any(len(parts) > 1 for parts in split.values()):
        counts: dict[tuple[str, str], int] = {}
        for parts in split.values():
            for pair in pairwise(parts):
                counts[pair] = counts.get(pair, 0) + 1
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        for word, parts in split.items():
            i, merged = 0, []
            while i < len(parts):
                if tuple(parts[i : i + 2]) == best:
                    merged.append(parts[i] + parts[i + 1])
                    i += 2
                else:
                    merged.append(parts[i])
                    i += 1
            split[word] = merged
    return merges


def build_tokenizer(folder: Path) -> "CLIPTokenizer":
    """Writes vocabulary and merges into the folder and loads them as a CLIPTokenizer."""
    from transformers import CLIPTokenizer

    words = vocabulary()
    merges = learn_merges(words)
    letters = sorted({letter for word in words for letter in word})
    symbols = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocab = {symbol: i for i, symbol in enumerate([*symbols, START, END])}
    unfinished = folder.with_name(folder.name + ".part")
    unfinished.mkdir(parents=True, exist_ok=True)
    (unfinished / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (unfinished / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = CLIPTokenizer(
        vocab=str(unfinished / "vocab.json"), merges=str(unfinished / "merges.txt"),
        unk_token=END, bos_token=START, eos_token=END, pad_token=END, model_max_length=LENGTH,
    )  # fmt: skip
    tokenizer.save_pretrained(unfinished)
    swap_in(unfinished, folder)
    return tokenizer
