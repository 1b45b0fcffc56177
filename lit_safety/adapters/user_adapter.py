"""User attention in every cross-attention layer of a diffusers UNet (Stable Diffusion 1.x, 2.x, SDXL)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lit_safety.adapters import user_lora
from lit_safety.adapters.user_attention import UserAttention, WithoutUser
from lit_safety.adapters.user_projection import UserProjection
from lit_safety.errors import UserError

#: The UNet's submodule that makes user tokens.
PROJECTION = "user_projection"
#: What the plain attention layers of these families never have, so `UserAttention` does not compute it.
_UNUSED = ("group_norm", "spatial_norm", "norm_cross", "norm_q", "norm_k", "added_kv_proj_dim", "residual_connection")


def cross_attentions(unet: Any) -> dict[str, Any]:
    """Name -> cross-attention layer, in the order of diffusers' `attn_processors`: down, up, middle.

    Raises:
        UserError: there are none, or they attend to contexts of different widths.
    """
    # Under torch.compile the names belong to the module inside.
    unet = getattr(unet, "_orig_mod", unet)
    names = [name.removesuffix(".processor") for name in getattr(unet, "attn_processors", {})]
    layers = {name: unet.get_submodule(name) for name in names if name.endswith(".attn2")}
    # Not its weight's shape, which is empty where ZeRO 3 has taken it to pieces.
    widths = sorted({layer.to_k.in_features for layer in layers.values()})
    if len(widths) != 1:
        found = f"attend to contexts of widths {widths}" if widths else "has no cross-attention layer named attn2"
        raise UserError(f"{type(unet).__name__}: {found}; user attention is for the UNets of Stable Diffusion and SDXL")
    return layers


class UserAdapter:
    """A handle on the user attention inside a UNet; all weights belong to the UNet.

    Tokens travel as an argument of the call, `cross_attention_kwargs={"user_tokens": (B, N, d_ctx)}`, not as state:
    a layer that is computed again in the backward pass, a second thread or another batch cannot see the wrong user.
    """

    def __init__(self, unet: Any, projection: UserProjection, layers: dict[str, UserAttention]) -> None:
        self.unet = unet
        self.projection = projection
        self.layers = layers

    @classmethod
    def attach(cls, unet: Any, embedding_dim: int, tokens: int = 4) -> UserAdapter:
        """Put fresh user attention into `unet`: the base's output to the bit, trainable, in fp32.

        Raises:
            UserError: `unet` has one already, or its attention is of another kind.
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
            UserError: it has none, something has replaced it in some layer, or its LoRA was switched off.
        """
        layers = {name: attn.get_processor() for name, attn in cross_attentions(unet).items()}
        projection = getattr(unet, PROJECTION, None)
        lost = [name for name, processor in layers.items() if not isinstance(processor, UserAttention)]
        if projection is None:
            raise UserError("this denoiser has no user attention: load it with load_psa first")
        if lost:
            raise UserError(
                f"{lost[0]}: its user attention was replaced by {type(layers[lost[0]]).__name__}, so the user's bounds "
                "would not hold; attention slicing, xformers and fused projections do that: leave them off"
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
        """Weigh the user branch, and the LoRA that was loaded with it; 0 is the base model, to the bit."""
        for layer in self.layers.values():
            layer.scale = float(scale)
        user_lora.set_scale(self.unet, scale)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within, the UNet is the base model and takes no user: the reference. Leave before any backward pass."""
        for layer in self.layers.values():
            layer.enabled = False
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.enabled = True


def detach(unet: Any) -> None:
    """Take user attention out again, what is left of it where something has replaced it in some layers, and its LoRA.

    Raises:
        UserError: the LoRA is fused.
    """
    user_lora.remove(unet)
    for name, processor in unet.attn_processors.items():
        if isinstance(processor, (UserAttention, WithoutUser)):
            unet.get_submodule(name.removesuffix(".processor")).set_processor(processor.replaced)
    delattr(unet, PROJECTION)


def user_arguments(tokens: Tensor) -> dict[str, Any]:
    """What a call of the UNet needs for user tokens (B, N, d_ctx)."""
    return {"cross_attention_kwargs": {"user_tokens": tokens}}


def _refuse_unknown(name: str, attn: Any) -> None:
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    processor = attn.get_processor()
    if isinstance(processor, UserAttention):
        raise UserError("this denoiser has user attention already: unload it first")
    if type(processor) not in (AttnProcessor, AttnProcessor2_0):
        raise UserError(
            f"{name} computes its attention by {type(processor).__name__}; user attention stands beside the plain one "
            "only: leave attention slicing, xformers, IP-Adapters and fused projections off"
        )
    odd = [part for part in _UNUSED if getattr(attn, part, None)]
    if odd or attn.rescale_output_factor != 1.0:
        raise UserError(f"{name}: attention with {(odd or ['rescale_output_factor'])[0]} is not supported")
