"""Text by a CLIP encoder as SDXL and SD3 read it: the layer before the last, and the pooled projection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def penultimate(
    tokenizer: Any, encoder: Any, prompts: Sequence[str], length: int | None = None
) -> tuple[Tensor, Tensor]:
    """B prompts -> hidden states (B, tokens, width) of the layer before the last, and the encoder's first output.

    The first output is the pooled projection (B, P) of a `CLIPTextModelWithProjection`, else the last hidden states.

    Args:
        tokenizer: the encoder's.
        encoder: a CLIP text model.
        prompts: texts; what is too long is cut, the end token kept.
        length: tokens; None: as the tokenizer says.
    """
    tokens = tokenizer(
        list(prompts),
        padding="max_length",
        max_length=length or tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    found = encoder(tokens.input_ids.to(encoder.device, non_blocking=True), output_hidden_states=True)
    return found.hidden_states[-2], found[0]
