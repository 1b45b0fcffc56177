"""User cross-attention beside the unchanged text branch of one attention layer.

Personalized Safety Alignment (arXiv 2508.01151), its decoupled attention:

    O = SDPA(q, Wk T, Wv T) + scale * SDPA(q, W'k u, W'v u)        before to_out

T are text tokens (B, L, d_ctx), u user tokens (B, N, d_ctx). The published code has one user token, over which softmax
is 1: there the user branch is W'v u at every pixel, and W'k never moves. Here N tokens are attended together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from lit_safety.errors import UserError


class UserAttention(nn.Module):
    """The attention processor of one cross-attention layer; holds W'k and W'v as fp32 masters.

    W'v starts at zero, so that the output is the base's to the bit. W'k starts as the base's Wk, which already knows
    how to read this context. One user token needs no attention: W'k has no effect then and is frozen, so that no rank
    waits for its gradient.

    Args:
        attn: the diffusers attention layer this is made for (its LoRA, if it has one, is applied, not copied).
        tokens: N.
    """

    def __init__(self, attn: Any, tokens: int) -> None:
        super().__init__()
        base = attn.to_k.weight
        hidden, context_dim = base.shape
        self.tokens = tokens
        self.replaced = attn.get_processor()
        self.scale = 1.0
        #: False: the base's output, and no user tokens are asked for.
        self.enabled = True
        self.to_k_user = nn.Linear(context_dim, hidden, bias=False, device=base.device, dtype=torch.float32)
        self.to_v_user = nn.Linear(context_dim, hidden, bias=False, device=base.device, dtype=torch.float32)
        with torch.no_grad():
            self.to_k_user.weight.copy_(base if tokens > 1 else torch.zeros_like(base))
            self.to_v_user.weight.zero_()
        self.to_k_user.weight.requires_grad_(tokens > 1)

    # diffusers reads the names of the arguments off `__call__`, so it is this and not `forward`.
    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        user_tokens: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (B, pixels, hidden) -> the same, given text tokens (B, L, d_ctx) and user tokens (B, N, d_ctx).

        Raises:
            UserError: no user tokens, or not one set a row: a missing user must not pass for a safe one.
        """
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        batch, length, _ = text.shape
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, length, batch)
            attention_mask = attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])
        # Through the modules, so that a LoRA on them counts.
        query = _heads(attn.to_q(hidden_states), attn.heads)
        key, value = _heads(attn.to_k(text), attn.heads), _heads(attn.to_v(text), attn.heads)
        out = _merge(scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)).to(query.dtype)
        if self.enabled and self.scale != 0.0:
            out = out + self.scale * self._user_branch(query, user_tokens)
        return attn.to_out[1](attn.to_out[0](out))

    def _user_branch(self, query: Tensor, users: Tensor | None) -> Tensor:
        """(B, pixels, hidden), or (B, 1, hidden) for one user token."""
        if users is None:
            raise UserError(
                "this denoiser has user attention and was called without a user: draw through load_psa's pipeline, or "
                'give cross_attention_kwargs={"user_tokens": ...}'
            )
        if users.shape[:2] != (query.shape[0], self.tokens):
            raise UserError(
                f"user tokens of shape {tuple(users.shape)} for {query.shape[0]} rows of pictures and an adapter of "
                f"{self.tokens} tokens: give one set of tokens a row"
            )
        users = users.to(self.to_v_user.weight.dtype)
        value = self.to_v_user(users).to(query.dtype)
        if self.tokens == 1:  # softmax over one token is 1
            return value
        heads = query.shape[1]
        key = _heads(self.to_k_user(users).to(query.dtype), heads)
        return _merge(scaled_dot_product_attention(query, key, _heads(value, heads))).to(query.dtype)


class WithoutUser:
    """A self-attention layer's own processor, made deaf to the user tokens that diffusers hands to every layer."""

    def __init__(self, replaced: Any) -> None:
        self.replaced = replaced

    def __call__(self, attn: Any, hidden_states: Tensor, user_tokens: Tensor | None = None, **others: Any) -> Tensor:
        return self.replaced(attn, hidden_states, **others)


def _heads(rows: Tensor, heads: int) -> Tensor:
    """(B, length, heads * d) -> (B, heads, length, d)"""
    return rows.unflatten(-1, (heads, -1)).transpose(1, 2)


def _merge(rows: Tensor) -> Tensor:
    """(B, heads, length, d) -> (B, length, heads * d)"""
    return rows.transpose(1, 2).flatten(2)
