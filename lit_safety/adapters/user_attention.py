"""A user's embedding as tokens that the denoiser attends to.

Personalized Safety Alignment (arXiv 2508.01151): Linear -> (B, N, d_ctx) -> LayerNorm. Two things are ours. Embeddings
are standardised first: a language model's embeddings have nearly the same direction (mutual cosine 0.995), so that raw
ones differ only in their last digits. And there is a learned null user, for guidance and for unknown users.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from lit_safety.adapters import user_lora
from lit_safety.core.errors import UserError


def statistics(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (D,) of embeddings (U, D), float32; a constant dimension gets a deviation of 1.

    Raises:
        ValueError: there are fewer than two embeddings.
    """
    if len(embeddings) < 2:
        raise ValueError("standardisation needs the embeddings of two users or more")
    exact = embeddings.double()
    mean, std = exact.mean(0), exact.std(0)
    # If all users agree, rounding leaves a tiny deviation; dividing by it would amplify noise.
    constant = std <= 1e-6 * mean.abs().clamp_min(1e-6)
    return mean.float(), std.masked_fill(constant, 1.0).float()


class UserProjection(nn.Module):
    """(B, D) embeddings -> (B, N, d_ctx) user tokens, always in fp32.

    Args:
        embedding_dim: D.
        context_dim: d_ctx, the width of the denoiser's cross-attention context.
        tokens: N.
        device: where the weights are made.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, embedding_dim: int, context_dim: int, tokens: int = 4, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": torch.float32}
        self.linear = nn.Linear(embedding_dim, tokens * context_dim, **factory)
        self.norm = nn.LayerNorm(context_dim, **factory)
        #: The null user before the LayerNorm, (N, d_ctx).
        self.null_tokens = nn.Parameter(torch.randn(tokens, context_dim, **factory))
        self.register_buffer("mean", torch.zeros(embedding_dim, **factory))
        self.register_buffer("std", torch.ones(embedding_dim, **factory))
        #: Layers of the LoRA that was loaded with it; without them the user's bounds would not hold.
        self.lora_layers: tuple[str, ...] = ()

    @property
    def embedding_dim(self) -> int:
        return self.linear.in_features

    @property
    def tokens(self) -> int:
        return self.null_tokens.shape[0]

    @property
    def context_dim(self) -> int:
        return self.null_tokens.shape[1]

    def standardise_by(self, embeddings: Tensor) -> None:
        """Take mean and deviation from the training users' embeddings (U, D)."""
        mean, std = statistics(embeddings)
        self.mean.copy_(mean)
        self.std.copy_(std)

    def forward(self, users: Tensor, known: Tensor | None = None) -> Tensor:
        """User tokens.

        Args:
            users: embeddings (B, D); the rows of unknown users may hold any values.
            known: bool (B,); False gives the null user. None: all are known.

        Returns:
            float32 (B, N, d_ctx). Every parameter is used for any ``known``, so no rank waits for a gradient.
        """
        with torch.autocast(users.device.type, enabled=False):
            unknown = torch.zeros(len(users), dtype=torch.bool, device=users.device) if known is None else ~known
            standardised = (users.float() - self.mean) / self.std
            # At the beginning too: a NaN in an unknown user's row would reach the gradient as 0 * NaN.
            standardised = standardised.masked_fill(unknown[:, None], 0.0)
            tokens = self.linear(standardised).unflatten(-1, (self.tokens, self.context_dim))
            return self.norm(torch.where(unknown[:, None, None], self.null_tokens, tokens))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> UserProjection:
        """Move to devices, but stay in fp32 when the network is converted to half precision.

        Half precision would lose digits of the mean that distinguish users.
        """

        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype != tensor.dtype else moved

        return super()._apply(keep, recurse)


# User cross-attention next to the unchanged text branch of one attention layer.
#
# Personalized Safety Alignment (arXiv 2508.01151), its decoupled attention:
#
#     O = SDPA(q, Wk T, Wv T) + scale * SDPA(q, W'k u, W'v u)        before to_out
#
# T are text tokens (B, L, d_ctx), u user tokens (B, N, d_ctx). The published code has one user token, whose softmax
# is 1: the user branch is then W'v u at every pixel, and W'k never changes. Here the attention is over N tokens.


class UserAttention(nn.Module):
    """The attention processor of one cross-attention layer; holds W'k and W'v as fp32 masters.

    W'v starts at zero, so that the output is equal to the base's to the bit. W'k starts as the base's Wk, which is
    already trained on this context. With one user token W'k has no effect and is frozen, so that ranks do not wait for
    its gradient.

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
        #: False: the base's output, without user tokens.
        self.enabled = True
        self.to_k_user = nn.Linear(context_dim, hidden, bias=False, device=base.device, dtype=torch.float32)
        self.to_v_user = nn.Linear(context_dim, hidden, bias=False, device=base.device, dtype=torch.float32)
        with torch.no_grad():
            self.to_k_user.weight.copy_(base if tokens > 1 else torch.zeros_like(base))
            self.to_v_user.weight.zero_()
        self.to_k_user.weight.requires_grad_(tokens > 1)

    # diffusers reads the names of the arguments from `__call__`, so it is this and not `forward`.
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
            UserError: without user tokens, or not one set for each row: a missing user must not count as a safe one.
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
                "this denoiser has user attention and was called without a user: draw with load_psa's pipeline, or "
                'give cross_attention_kwargs={"user_tokens": ...}'
            )
        if users.shape[:2] != (query.shape[0], self.tokens):
            raise UserError(
                f"user tokens of shape {tuple(users.shape)} for {query.shape[0]} rows of images and an adapter of "
                f"{self.tokens} tokens: give one set of tokens for each row"
            )
        users = users.to(self.to_v_user.weight.dtype)
        value = self.to_v_user(users).to(query.dtype)
        if self.tokens == 1:  # softmax over one token is 1
            return value
        heads = query.shape[1]
        key = _heads(self.to_k_user(users).to(query.dtype), heads)
        return _merge(scaled_dot_product_attention(query, key, _heads(value, heads))).to(query.dtype)


class WithoutUser:
    """A self-attention layer's own processor, called without the user tokens that diffusers passes to every layer."""

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


# User attention in every cross-attention layer of a diffusers UNet (Stable Diffusion 1.x, 2.x, SDXL).


#: The UNet's submodule that makes user tokens.
PROJECTION = "user_projection"
#: Features that plain attention layers of these families never have, so `UserAttention` does not compute them.
_UNUSED = ("group_norm", "spatial_norm", "norm_cross", "norm_q", "norm_k", "added_kv_proj_dim", "residual_connection")


def cross_attentions(unet: Any) -> dict[str, Any]:
    """Name -> cross-attention layer, in the order of diffusers' `attn_processors`: down, up, middle.

    Raises:
        UserError: there are none, or their contexts have different widths.
    """
    # Under torch.compile the names are those of the inner module.
    unet = getattr(unet, "_orig_mod", unet)
    names = [name.removesuffix(".processor") for name in getattr(unet, "attn_processors", {})]
    layers = {name: unet.get_submodule(name) for name in names if name.endswith(".attn2")}
    # Not its weight's shape, which is empty if ZeRO 3 has sharded it.
    widths = sorted({layer.to_k.in_features for layer in layers.values()})
    if len(widths) != 1:
        found = f"has contexts of different widths {widths}" if widths else "has no cross-attention layer named attn2"
        raise UserError(f"{type(unet).__name__}: {found}; user attention is for the UNets of Stable Diffusion and SDXL")
    return layers


class UserAdapter:
    """The user attention inside a UNet; all weights belong to the UNet.

    Tokens are an argument of the call, `cross_attention_kwargs={"user_tokens": (B, N, d_ctx)}`, and not a state. So a
    layer that is computed again in the backward pass, a second thread or another batch cannot use the wrong user.
    """

    def __init__(self, unet: Any, projection: UserProjection, layers: dict[str, UserAttention]) -> None:
        self.unet = unet
        self.projection = projection
        self.layers = layers

    @classmethod
    def attach(cls, unet: Any, embedding_dim: int, tokens: int = 4) -> UserAdapter:
        """Put new user attention into `unet`: trainable, in fp32, with an output equal to the base's to the bit.

        Raises:
            UserError: `unet` already has user attention, or its attention is of another kind.
        """
        if embedding_dim < 1 or tokens < 1:
            raise ValueError(f"embedding_dim and tokens must be at least 1, got {embedding_dim} and {tokens}")
        layers = cross_attentions(unet)
        for name, attn in layers.items():
            _refuse_unknown(name, attn)
        context = next(iter(layers.values())).to_k.weight
        projection = UserProjection(embedding_dim, context.shape[1], tokens, context.device)
        users = {name: UserAttention(attn, tokens) for name, attn in layers.items()}
        for name in unet.attn_processors:
            attn = unet.get_submodule(name.removesuffix(".processor"))
            own = users.get(name.removesuffix(".processor"))
            attn.set_processor(WithoutUser(attn.get_processor()) if own is None else own)
        unet.add_module(PROJECTION, projection)
        return cls(unet, projection, users)

    @classmethod
    def of(cls, unet: Any) -> UserAdapter:
        """The user attention that `unet` has.

        Raises:
            UserError: it has none, it was replaced in some layer, or its LoRA was switched off.
        """
        layers = {name: attn.get_processor() for name, attn in cross_attentions(unet).items()}
        projection = getattr(unet, PROJECTION, None)
        lost = [name for name, processor in layers.items() if not isinstance(processor, UserAttention)]
        if projection is None:
            raise UserError("this denoiser has no user attention: load it with load_psa first")
        if lost:
            raise UserError(
                f"{lost[0]}: its user attention was replaced by {type(layers[lost[0]]).__name__}, so the user's bounds "
                "would not hold; attention slicing, xformers and fused projections do that: switch them off"
            )
        if (layer := user_lora.lost(unet, projection.lora_layers)) is not None:
            raise UserError(
                f"{layer}: the user adapter's LoRA is not active, so the user's bounds would not hold; name "
                f"'{user_lora.ADAPTER}' among the adapters of `pipe.set_adapters`"
            )
        return cls(unet, projection, layers)

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Every weight of the adapter: projection, null user, then W'k and W'v layer by layer."""
        found = [(f"{PROJECTION}.{name}", parameter) for name, parameter in self.projection.named_parameters()]
        for layer, attention in self.layers.items():
            found += [(f"{layer}.{name}", parameter) for name, parameter in attention.named_parameters()]
        return found

    def set_scale(self, scale: float) -> None:
        """Set the weight of the user branch and of the LoRA that was loaded with it; 0 is the base model, to the
        bit."""
        for layer in self.layers.values():
            layer.scale = float(scale)
        user_lora.set_scale(self.unet, scale)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside, the UNet is the base model without a user: the reference. Leave before any backward pass."""
        for layer in self.layers.values():
            layer.enabled = False
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.enabled = True


def detach(unet: Any) -> None:
    """Remove user attention and its LoRA, also if it was replaced in some layers.

    Raises:
        UserError: the LoRA is fused.
    """
    user_lora.remove(unet)
    for name, processor in unet.attn_processors.items():
        if isinstance(processor, (UserAttention, WithoutUser)):
            unet.get_submodule(name.removesuffix(".processor")).set_processor(processor.replaced)
    delattr(unet, PROJECTION)


def user_arguments(tokens: Tensor) -> dict[str, Any]:
    """The arguments of a UNet's call for user tokens (B, N, d_ctx)."""
    return {"cross_attention_kwargs": {"user_tokens": tokens}}


def _refuse_unknown(name: str, attn: Any) -> None:
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    processor = attn.get_processor()
    if isinstance(processor, UserAttention):
        raise UserError("this denoiser has user attention already: unload it first")
    if type(processor) not in (AttnProcessor, AttnProcessor2_0):
        raise UserError(
            f"{name} computes its attention by {type(processor).__name__}; user attention works only with the plain "
            "one: switch attention slicing, xformers, IP-Adapters and fused projections off"
        )
    odd = [part for part in _UNUSED if getattr(attn, part, None)]
    if odd or attn.rescale_output_factor != 1.0:
        raise UserError(f"{name}: attention with {(odd or ['rescale_output_factor'])[0]} is not supported")
