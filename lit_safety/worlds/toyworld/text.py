"""A genuine CLIPTokenizer whose byte-pair merges make each word of the toy world one token."""

import json
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lit_safety.core.files import atomic_folder
from lit_safety.judges.toy.objects import LABELS, SETTINGS
from lit_safety.worlds.text_training import Lessons, learn_captions
from lit_safety.worlds.toyworld.captions import draw_caption, vocabulary
from lit_safety.worlds.toyworld.emblems import COLOURS
from lit_safety.worlds.toyworld.sampling import Contents, draw_scene
from lit_safety.worlds.toyworld.seeds import stream

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
    with atomic_folder(folder) as unfinished:
        (unfinished / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
        (unfinished / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        tokenizer = CLIPTokenizer(
            vocab=str(unfinished / "vocab.json"), merges=str(unfinished / "merges.txt"),
            unk_token=END, bos_token=START, eos_token=END, pad_token=END, model_max_length=LENGTH,
        )  # fmt: skip
        tokenizer.save_pretrained(unfinished)
    return tokenizer


# The toy pipeline's CLIPTextModel, which learns the meaning of captions before the UNet is trained.
#
# A small head predicts from the end token the first and the second thing, their colours and the setting. So a name and
# the phrases for it get similar features in minutes; training the UNet alone would take hours for this.


WIDTH = 128
_NAMES = ["", *LABELS]
_COLOURS = ["", *COLOURS]
_SETTINGS = list(SETTINGS)
CLASSES = (len(_NAMES), len(_COLOURS), len(_NAMES), len(_COLOURS), len(_SETTINGS))
"""How many values each number of `meaning` can take."""


def meaning(setting: str, contents: Contents) -> list[int]:
    """A caption's meaning as five numbers: first thing, its colour, second thing, its colour, setting."""
    row = []
    for name, colour in (*contents, ("", None))[:2]:
        row += [_NAMES.index(name), _COLOURS.index(colour or "")]
    return [*row, _SETTINGS.index(setting)]


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained text tower: 2 layers, 4 heads."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=LENGTH, projection_dim=WIDTH,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id, attention_dropout=0.0,
        )
    )  # fmt: skip


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Token ids (B, LENGTH)."""
    return tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt").input_ids


def _meanings(owner: str, start: int, count: int) -> tuple[list[str], Tensor]:
    captions, rows = [], []
    for i in range(start, start + count):
        rng = stream(owner, i)
        scene, contents = draw_scene(rng)
        captions.append(draw_caption(rng, scene.setting, contents, implicit=0.5))
        rows.append(meaning(scene.setting, contents))
    return captions, torch.tensor(rows)


def train_text_encoder(
    work: Path, minutes: float, count: int = 30_000, batch_size: int = 256, lr: float = 2e-3
) -> float:
    """Learns `count` captions and writes text_encoder/ into the work folder.

    Returns the share of new captions for which all numbers are right.
    """
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    encoder = new_text_encoder(tokenizer).train()
    captions, meanings = _meanings("base", 1_000_000, count)
    fresh, meant = _meanings("checks", 0, min(2000, count))
    lessons = Lessons(tokenize(tokenizer, captions), meanings, tokenize(tokenizer, fresh), meant)
    return learn_captions(work, encoder, CLASSES, lessons, minutes, batch_size, lr)
