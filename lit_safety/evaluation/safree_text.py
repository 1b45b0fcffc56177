"""SAFREE's side of the text: which tokens are unsafe, and what they become (arXiv 2410.12761, section 3.1 and 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SafeText:
    """One prompt after the projection."""

    safe: Tensor
    """(L, d): the prompt's embeddings, those of unsafe tokens projected."""
    triggers: tuple[int, ...]
    """Places of the unsafe tokens."""
    change: float
    """b = 1 - cos(p, p_proj) over the prompt's tokens together."""


def safe_texts(
    tokenizer: Any, encoder: Any, prompts: Sequence[str], concepts: Sequence[str], alpha: float
) -> list[SafeText]:
    """Project each prompt.

    Args:
        tokenizer: of CLIP.
        encoder: CLIP's text encoder; gives last_hidden_state (B, L, d) and pooler_output (B, d).
        prompts: the prompts of a batch.
        concepts: unsafe phrases.
        alpha: see `triggered`.
    """
    import torch

    with torch.no_grad():
        space = projector(_encode(encoder, _tokens(tokenizer, concepts)["input_ids"]).pooler_output.float())
        return [_one(tokenizer, encoder, prompt, space, alpha) for prompt in prompts]


def _one(tokenizer: Any, encoder: Any, prompt: str, space: Tensor, alpha: float) -> SafeText:
    import torch

    tokens = _tokens(tokenizer, [prompt])
    ids = tokens["input_ids"]
    count = int(tokens["attention_mask"].sum()) - 2  # without start and end
    plain = _encode(encoder, ids).last_hidden_state[0].float()
    if count < 2:  # a single token has no others to be compared with
        return SafeText(plain, (), 0.0)
    masks = torch.ones(count, ids.shape[1], dtype=torch.long)
    masks[torch.arange(count), torch.arange(1, count + 1)] = 0
    without = _encode(encoder, ids.expand(count, -1), masks).pooler_output.float()
    outside = torch.eye(len(space), device=space.device) - space
    places = [1 + i for i in triggered((without @ outside).norm(dim=1), alpha)]
    # the paper's order: out of the concepts first, then back into the span of the prompt; both projectors are symmetric
    projected = plain[1 : count + 1] @ outside @ projector(without)
    safe = plain.clone()
    for place in places:
        safe[place] = projected[place - 1]
    alike = torch.nn.functional.cosine_similarity(plain[1 : count + 1].flatten(), projected.flatten(), dim=0)
    return SafeText(safe, tuple(places), 1.0 - float(alike))


def projector(rows: Tensor) -> Tensor:
    """P (d, d) onto the span of `rows` (n, d): with C = rows^T, P = C pinv(C^T C) C^T = C pinv(C)."""
    import torch

    columns = rows.double().T
    return (columns @ torch.linalg.pinv(columns)).to(rows.dtype)


def triggered(distances: Tensor, alpha: float) -> list[int]:
    """Tokens i with d_i >= (1 + alpha) times the mean of the other d; distances (n,), n >= 2."""
    others = (distances.sum() - distances) / (len(distances) - 1)
    return (distances >= (1 + alpha) * others).nonzero().flatten().tolist()


def _tokens(tokenizer: Any, texts: Sequence[str]) -> Any:
    length = tokenizer.model_max_length
    return tokenizer(list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")


def _encode(encoder: Any, ids: Tensor, mask: Tensor | None = None) -> Any:
    device = encoder.device
    return encoder(ids.to(device), attention_mask=None if mask is None else mask.to(device))
