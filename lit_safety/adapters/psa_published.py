"""The published checkpoint layout of Personalized Safety Alignment (arXiv 2508.01151), read and written.

`psa_adapter.bin` is a torch file of

    {"psa_adapter": {"<i>.to_k_user.0.weight": (hidden, d_ctx), "<i>.to_v_user.0.weight": (hidden, d_ctx)},
     "user_proj": {"proj.weight": (d_ctx, D), "proj.bias", "norm.weight", "norm.bias": (d_ctx,)}}

`<i>` counts cross-attention layers in the order of diffusers' `attn_processors`; `user_adapter` is another name of
`psa_adapter`. The safetensors variant has the same names with `psa_adapter.` and `user_proj.` in front. The layout has
one user token, no statistics and no null user: its readers put the zero vector through the projection instead.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from lit_safety.adapters.psa_tensors import LARGEST_EMBEDDING
from lit_safety.adapters.user_adapter import UserAdapter
from lit_safety.data.atomic import atomic_file, write_atomic
from lit_safety.errors import UserError

_LAYERS = ("psa_adapter.", "user_adapter.")
#: Published name -> ours, of the projection.
_PROJECTION = {
    "user_proj.proj.weight": "projection.linear.weight",
    "user_proj.proj.bias": "projection.linear.bias",
    "user_proj.norm.weight": "projection.norm.weight",
    "user_proj.norm.bias": "projection.norm.bias",
}


def is_published(tensors: Mapping[str, object]) -> bool:
    """Whether names are those of the published layout."""
    return any(name.startswith((*_LAYERS, "user_proj.")) for name in tensors)


def from_published(
    tensors: Mapping[str, Tensor], layers: Mapping[str, tuple[int, ...]], file: Path
) -> dict[str, Tensor]:
    """The same weights under our names; statistics that change nothing, and the published null user.

    Args:
        tensors: as read.
        layers: the model's layers in the order of `attn_processors`.
        file: for messages.

    Raises:
        UserError: a layer is missing, or there are more than this model has.
    """
    rest = dict(tensors)
    named = {}
    for published, ours in _PROJECTION.items():
        if published not in rest:
            raise UserError(f"{file}: {published} is missing; is the file complete?")
        named[ours] = rest.pop(published)
    for index, layer in enumerate(layers):
        for side in ("to_k_user", "to_v_user"):
            found = [prefix for prefix in _LAYERS if f"{prefix}{index}.{side}.0.weight" in rest]
            if len(found) > 1:
                raise UserError(f"{file} holds both psa_adapter and user_adapter, two names of the same: take one out")
            if not found:
                raise UserError(
                    f"{file}: {_LAYERS[0]}{index}.{side}.0.weight is missing, which is for {layer}; is the file "
                    "complete, and made for this backbone?"
                )
            named[f"layers.{layer}.{side}.weight"] = rest.pop(f"{found[0]}{index}.{side}.0.weight")
    if rest:
        name = min(rest)
        many = ".to_k_user." in name or ".to_v_user." in name
        why = "more than one user token, or made for a backbone of more layers" if many else "not of this layout"
        raise UserError(f"{file}: {name} is {why}; it cannot be loaded into this model")
    weight, bias = named["projection.linear.weight"], named["projection.linear.bias"]
    # Shapes may lie about memory (a stride of 0), so they are looked at before anything of their size is made.
    if weight.ndim != 2 or bias.ndim != 1 or weight.shape[1] > LARGEST_EMBEDDING:
        raise UserError(f"{file}: user_proj.proj is no linear layer of user embeddings")
    named["projection.mean"], named["projection.std"] = torch.zeros(weight.shape[1]), torch.ones(weight.shape[1])
    named["projection.null_tokens"] = bias[None]  # what the zero vector is projected to
    return named


def to_published(adapter: UserAdapter) -> dict[str, dict[str, Tensor]]:
    """The adapter in the published layout; standardisation is folded into the projection:

        proj(e) = W ((e - mean) / std) + b = (W / std) e + (b - W (mean / std))

    Raises:
        UserError: the adapter has more than one user token.
    """
    projection = adapter.projection
    if projection.tokens != 1:
        raise UserError(
            f"the published layout knows one user token, this adapter has {projection.tokens}: keep it in "
            "user_adapter.safetensors, or train one with 1 token"
        )
    weight = projection.linear.weight.detach().double() / projection.std.double()
    bias = projection.linear.bias.detach().double() - weight @ projection.mean.double()
    layers = {}
    for index, attention in enumerate(adapter.layers.values()):
        layers[f"{index}.to_k_user.0.weight"] = attention.to_k_user.weight
        layers[f"{index}.to_v_user.0.weight"] = attention.to_v_user.weight
    users = {"proj.weight": weight, "proj.bias": bias}
    users |= {"norm.weight": projection.norm.weight, "norm.bias": projection.norm.bias}
    # A copy each: a view would drag the storage it looks into along.
    own = {"psa_adapter": layers, "user_proj": users}
    return {
        part: {name: tensor.detach().cpu().float().clone().contiguous() for name, tensor in tensors.items()}
        for part, tensors in own.items()
    }


def save_published(adapter: UserAdapter, file: Path) -> Path:
    """Write `file` in the published layout: a torch file for `.bin`, else safetensors.

    Warns that a learned null user is lost, since the layout has no place for it.

    Raises:
        UserError: the adapter has more than one user token, or the file cannot be written.
    """
    parts = to_published(adapter)
    if not torch.equal(parts["user_proj"]["proj.bias"], adapter.projection.null_tokens.detach().cpu()[0]):
        warnings.warn(
            f"{file}: the published layout has no null user; its readers use the zero vector instead of the one that "
            "was learned, for guidance and for unknown users",
            stacklevel=2,
        )
    if file.suffix == ".bin":
        with atomic_file(file) as out:
            torch.save(parts, out)
        return file
    flat = {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}
    return write_atomic(file, save(flat))
