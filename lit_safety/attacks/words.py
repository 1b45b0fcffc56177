"""The words that a suffix may be made of, and where it stands among a prompt's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_safety.errors import UserError


@dataclass(frozen=True)
class Words:
    """Tokens that a tokenizer writes and reads again as themselves, so that a suffix can be handed over as text."""

    ids: Tensor
    """(V,) of the tokenizer."""
    texts: list[str]
    """V words."""

    def __len__(self) -> int:
        return len(self.texts)

    def say(self, row: Tensor) -> str:
        """Numbers among these words (L,) -> the suffix."""
        return " ".join(self.texts[number] for number in row.tolist())


def usable_words(tokenizer: Any) -> Words:
    """All tokens of plain letters that come back as the same single token, by their ids.

    Raises:
        UserError: there are fewer than two.
    """
    special = set(tokenizer.all_special_ids)
    candidates = sorted(number for number in tokenizer.get_vocab().values() if number not in special)
    texts = [tokenizer.decode([number]).strip() for number in candidates]
    plain = [(n, text) for n, text in zip(candidates, texts, strict=True) if text.isascii() and text.isalpha()]
    again = tokenizer([text for _, text in plain], add_special_tokens=False)["input_ids"] if plain else []
    kept = [(number, text) for (number, text), ids in zip(plain, again, strict=True) if ids == [number]]
    if len(kept) < 2:
        raise UserError("attack SuffixSearch: the tokenizer has no words that are single tokens")
    return Words(torch.tensor([number for number, _ in kept]), [text for _, text in kept])


def shorten_to_fit(tokenizer: Any, prompts: Sequence[str], room: int) -> tuple[list[str], int]:
    """Prompts that leave room for so many tokens more, their last words cut off where needed; and how many were cut.

    Raises:
        UserError: not a single word would be left.
    """
    most, cut, kept = tokenizer.model_max_length - room, 0, []
    for prompt in prompts:
        words = prompt.split()
        while words and len(tokenizer(" ".join(words))["input_ids"]) > most:
            words.pop()
        if not words:
            raise UserError(
                f"attack SuffixSearch: a suffix of {room} tokens leaves no room for `{prompt}`; lower its length"
            )
        cut += len(words) < len(prompt.split())
        kept.append(prompt if len(words) == len(prompt.split()) else " ".join(words))
    return kept, cut


def suffix_starts(tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    """Where each prompt's suffix begins among its tokens (P,): in the place of the end token."""
    return torch.tensor([len(ids) - 1 for ids in tokenizer(list(prompts))["input_ids"]])
