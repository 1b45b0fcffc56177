"""Prompts on their way into the text encoders: the same rounding in every batch, and a count of what is cut off."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_safety.backbones.backbone import Backbone, Conditioning

log = logging.getLogger(__name__)


def too_long(tokenizer: Any, prompts: Sequence[str], limit: int) -> list[bool]:
    """For each prompt, whether it has more than ``limit`` tokens, its start and end tokens included.

    Encoders get the first of them and the end token: transformers' tokenizers keep it when they truncate.
    """
    # No token is shorter than a byte, so most prompts need not be split to know.
    doubtful = [number for number, prompt in enumerate(prompts) if len(prompt.encode()) > limit - 2]
    found = [False] * len(prompts)
    if doubtful:
        ids = tokenizer([prompts[number] for number in doubtful], truncation=False, verbose=False)["input_ids"]
        for number, one in zip(doubtful, ids, strict=True):
            found[number] = len(one) > limit
    return found


def encode_alike(backbone: Backbone, prompts: Sequence[str]) -> Conditioning:
    """``backbone.encode_text`` of B prompts, B rows, always in an even number of rows.

    CPU kernels take rows in pairs and round the one that is left over otherwise, and a cached row must be the one that
    training without a cache would compute. Pictures come in pairs anyway.
    """
    odd = len(prompts) % 2
    rows = backbone.encode_text([*prompts, *[""] * odd])
    return {name: tensor[: len(prompts)] for name, tensor in rows.items()} if odd else rows


class TruncatedPrompts:
    """Counts the different prompts that a text encoder does not read to their end, and names the first."""

    def __init__(self) -> None:
        self.prompts: dict[bytes, str] = {}
        """By the text's hash: the first one's text, and nothing of the others but that they were met."""

    def __len__(self) -> int:
        return len(self.prompts)

    def look(self, backbone: Backbone, prompts: Sequence[str]) -> None:
        """Count those of ``prompts`` that are too long; the first ever goes into the log."""
        for prompt, cut in zip(prompts, backbone.too_long(prompts), strict=True):
            if not cut:
                continue
            if not self.prompts:
                log.warning(
                    "a prompt is longer than the text encoder reads: its end is cut off, the end token kept; further "
                    "ones are counted: %r",
                    prompt,
                )
            name = hashlib.blake2b(prompt.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            self.prompts.setdefault(name, "" if self.prompts else prompt)
