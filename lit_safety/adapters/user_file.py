"""Files of user adapters: our own format, and reading of any layout into a UNet.

Ours is `user_adapter.safetensors`: `projection.*` (weights, null user, statistics); `layers.{layer}.to_k_user.weight`
and `.to_v_user.weight` by diffusers' layer names; `lora.*` if a LoRA was trained with it; and a JSON object in the
metadata. The published layout is described below.
"""

from __future__ import annotations

import json
import pickle
import struct
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lit_safety.adapters import user_lora
from lit_safety.adapters.lora import WEIGHTS_NAME as LORA_NAME
from lit_safety.adapters.lora import LoRA
from lit_safety.adapters.user_attention import UserAdapter, cross_attentions
from lit_safety.core.errors import UserError
from lit_safety.core.files import atomic_file, write_atomic
from lit_safety.core.text import load_json
from lit_safety.core.weights import is_pickled, not_readable

WEIGHTS_NAME = "user_adapter.safetensors"
#: The files that a folder may hold; the first one found is used: ours, then the published ones.
FILE_NAMES = (WEIGHTS_NAME, "psa_adapter.safetensors", "psa_adapter.bin")
METADATA_KEY = "lit_safety_user_adapter"
FORMAT_VERSION = 1
#: With a LoRA, which older releases would ignore.
VERSION_WITH_LORA = 2
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def save_user_adapter(adapter: UserAdapter, folder: Path, base_model: str, lora: str | None = None) -> Path:
    """Write `folder/user_adapter.safetensors`: the whole adapter, or nothing.

    Args:
        adapter: user attention.
        folder: the output folder.
        base_model: the model it was trained on.
        lora: PEFT's name of the LoRA that was trained with it; None: there was none.

    Raises:
        UserError: a weight is not finite or empty (as under ZeRO 3, when it was not gathered), or the disk is full.
    """
    own = _state(adapter) | ({} if lora is None else user_lora.state(adapter.unet, lora))
    # Also for one token's unused key projection, which is in bfloat16 under bf16-mixed, as all frozen weights are.
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in own.items()}
    for name, tensor in tensors.items():
        if tensor.numel() == 0 or not torch.isfinite(tensor).all():
            raise UserError(f"{name} is empty or holds numbers that are not finite, so the file was not written")
    projection = adapter.projection
    about = {
        "format_version": FORMAT_VERSION if lora is None else VERSION_WITH_LORA,
        "base_model": base_model,
        "tokens": projection.tokens,
        "embedding_dim": projection.embedding_dim,
        "context_dim": projection.context_dim,
    }
    if lora is not None:
        about["lora"] = user_lora.settings(adapter.unet, lora)
    metadata = {"format": "pt", METADATA_KEY: json.dumps(about, sort_keys=True)}
    return write_atomic(folder / WEIGHTS_NAME, save(tensors, metadata))


def find_user_adapter(path: str | Path) -> Path:
    """The weights in a folder (or the file itself).

    Raises:
        UserError: there are none.
    """
    path = Path(path)
    for file in [path / name for name in FILE_NAMES] if path.is_dir() else [path]:
        if file.is_file():
            return file
    raise UserError(f"no user adapter at {path}: expected a folder with one of {', '.join(FILE_NAMES)}, or such a file")


def is_user_adapter(path: str | Path) -> bool:
    """Whether a folder or file holds user attention, in our format or a published one; False if it does not exist.

    Raises:
        UserError: a folder also holds a LoRA, so that it is not clear which one is meant.
    """
    path = Path(path)
    if path.is_dir():
        found = [name for name in FILE_NAMES if (path / name).is_file()]
        if found and (path / LORA_NAME).is_file():
            raise UserError(f"{path} holds both {found[0]} and {LORA_NAME}: name the file that is meant")
        return bool(found)
    if not path.is_file():
        return False
    if is_pickled(path):
        return _names_users(path)
    try:
        with safe_open(path, framework="pt") as handle:
            return METADATA_KEY in (handle.metadata() or {}) or is_published(dict.fromkeys(handle.keys()))
    except (SafetensorError, OSError, ValueError):
        return False  # its error is reported when it is loaded


def _names_users(file: Path) -> bool:
    """Whether a torch file names the parts of the published layout. It is not unpickled; its bytes are searched."""
    try:
        with zipfile.ZipFile(file) as archive:
            index = next(one for one in archive.infolist() if one.filename.endswith("data.pkl"))
            names = archive.read(index) if index.file_size <= LARGEST_INDEX else b""
    except (StopIteration, RuntimeError, ValueError, NotImplementedError, zipfile.BadZipFile, zlib.error):
        with file.open("rb") as stream:  # a file of torch before 1.6: its error is reported when it is loaded
            names = stream.read(LARGEST_INDEX)
    except OSError:
        return False
    return any(name in names for name in (b"psa_adapter", b"user_adapter", b"user_proj"))


def load_user_adapter(unet: Any, path: str | Path) -> UserAdapter:
    """Attach user attention to `unet` with the weights of a folder or file, in our format or a published one.

    Raises:
        UserError: the file is missing, damaged or hostile; a layer is missing, unknown or of another shape; or it was
            made for another backbone.
    """
    return attach_weights(unet, read_weights(unet, path))


def fill_user_adapter(adapter: UserAdapter, path: str | Path, lora: LoRA | None = None, name: str = "policy") -> None:
    """Load the weights of a folder or file, including the statistics of users, into existing user attention.

    Args:
        adapter: user attention.
        path: the folder or file.
        lora: the LoRA that was attached with it; None: there is none.
        name: PEFT's name of it.

    Raises:
        UserError: as `load_user_adapter`; or the number of tokens, the size of embeddings or the LoRA differs.
    """
    weights = read_weights(adapter.unet, path)
    projection = adapter.projection
    if (weights.embedding_dim, weights.tokens) != (projection.embedding_dim, projection.tokens):
        raise UserError(
            f"{path} has {weights.tokens} user tokens for embeddings of {weights.embedding_dim} numbers, but this run "
            f"has {projection.tokens} for {projection.embedding_dim}"
        )
    held = weights.lora
    if (held is None) != (lora is None) or (held and lora and (held.rank, held.alpha) != (lora.rank, lora.alpha)):
        raise UserError(
            f"{path} has {'no LoRA' if held is None else f'a LoRA of rank {held.rank} and alpha {held.alpha:g}'}: set "
            "`model.init_args.lora` to the same"
        )
    if held is not None:
        names = {key.replace(f".{name}.", ".") for key, _ in adapter.unet.named_parameters() if f".{name}." in key}
        if names != set(held.tensors):
            raise UserError(f"{path} has a LoRA on other layers: set `lora.target_modules` to the same")
        user_lora.copy_weights(adapter.unet, name, held.tensors)
    _copy(adapter, weights.tensors)


@dataclass(frozen=True)
class Weights:
    """The content of a user adapter's file, checked against a UNet."""

    tensors: dict[str, Tensor]
    """By our names."""
    embedding_dim: int
    tokens: int
    lora: user_lora.UserLoRA | None = None


def attach_weights(unet: Any, weights: Weights) -> UserAdapter:
    """Attach user attention to `unet` with weights that `read_weights` checked against it.

    Raises:
        UserError: `unet` has user attention already, or its attention is of another kind.
    """
    adapter = UserAdapter.attach(unet, weights.embedding_dim, weights.tokens)
    _copy(adapter, weights.tensors)
    if weights.lora is not None:
        weights.lora.attach(unet)
        adapter.projection.lora_layers = tuple(weights.lora.layers)
    return adapter


def _copy(adapter: UserAdapter, tensors: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in _state(adapter).items():
            tensor.copy_(tensors[name])


def read_weights(unet: Any, path: str | Path) -> Weights:
    """The weights of a folder or file, in our format or a published one. `unet` is not changed.

    Raises:
        UserError: as `load_user_adapter`.
    """
    file = find_user_adapter(path)
    layers = {name: (attn.to_k.out_features, attn.to_k.in_features) for name, attn in cross_attentions(unet).items()}
    tensors, metadata = read_tensors(file, layers)
    if is_published(tensors):
        tensors, tokens, lora = from_published(tensors, layers, file), 1, None
    else:
        about = _read_about(metadata, layers, file)
        tokens, lora = about["tokens"], user_lora.read(unet, tensors, about, file)
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(user_lora.PREFIX)}
    embedding_dim = _embedding_dim(tensors, file)
    _check(tensors, _expected(layers, embedding_dim, tokens), file)
    return Weights(tensors, embedding_dim, tokens, lora)


def _state(adapter: UserAdapter) -> dict[str, Tensor]:
    """The adapter's own tensors by their names in the file."""
    state = {f"projection.{name}": tensor for name, tensor in adapter.projection.state_dict().items()}
    for layer, attention in adapter.layers.items():
        state |= {f"layers.{layer}.{name}": tensor for name, tensor in attention.state_dict().items()}
    return state


def _expected(layers: Mapping[str, tuple[int, ...]], embedding_dim: int, tokens: int) -> dict[str, tuple[int, ...]]:
    context_dim = next(iter(layers.values()))[1]
    # Layers first: their names help most in a message.
    expected = {
        f"layers.{layer}.{side}.weight": shape for layer, shape in layers.items() for side in ("to_k_user", "to_v_user")
    }
    return expected | {
        "projection.linear.weight": (tokens * context_dim, embedding_dim),
        "projection.linear.bias": (tokens * context_dim,),
        "projection.norm.weight": (context_dim,),
        "projection.norm.bias": (context_dim,),
        "projection.null_tokens": (tokens, context_dim),
        "projection.mean": (embedding_dim,),
        "projection.std": (embedding_dim,),
    }


def _check(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], file: Path) -> None:
    for name, shape in expected.items():
        if name not in tensors:
            raise UserError(f"{file}: {name} is missing; is the file complete, and made for this backbone?")
        if tuple(tensors[name].shape) != shape:
            raise UserError(
                f"{file} was made for another backbone: {name} has shape {tuple(tensors[name].shape)}, this model's "
                f"layer {shape}"
            )
        if tensors[name].dtype not in _DTYPES or not torch.isfinite(tensors[name]).all():
            raise UserError(f"{file}: {name} holds numbers that are not finite or not floating-point")
    unknown = sorted(set(tensors) - set(expected))
    if unknown:
        raise UserError(f"{file} was made for another backbone: this model lacks {unknown[0]}")
    if not (tensors["projection.std"] > 0).all():
        raise UserError(f"{file}: projection.std holds numbers that are not above 0")


def _embedding_dim(tensors: Mapping[str, Tensor], file: Path) -> int:
    weight = tensors.get("projection.linear.weight")
    if weight is None or weight.ndim != 2 or weight.shape[1] == 0:
        raise UserError(f"{file}: the weight of the user projection is missing or not a matrix")
    return weight.shape[1]


def _read_about(metadata: Mapping[str, str], layers: Mapping[str, tuple[int, ...]], file: Path) -> dict[str, Any]:
    try:
        about = load_json(metadata.get(METADATA_KEY, ""))
    except ValueError as error:
        raise UserError(
            f"{file} is not a user adapter: it lacks our metadata ({METADATA_KEY}) and the published keys"
        ) from error
    version = about.get("format_version") if isinstance(about, dict) else None
    if version not in (FORMAT_VERSION, VERSION_WITH_LORA):
        known = f"{FORMAT_VERSION} and {VERSION_WITH_LORA}"
        raise UserError(f"{file}: format version {version!r} is not known here (this release reads {known})")
    numbers = [about.get(key) for key in ("tokens", "embedding_dim", "context_dim")]
    if not all(type(number) is int and number > 0 for number in numbers):
        raise UserError(f"{file}: tokens, embedding_dim and context_dim in its metadata must be whole numbers above 0")
    width = next(iter(layers.values()))[1]
    if about["context_dim"] != width:
        raise UserError(
            f"{file} was made for another backbone ({about.get('base_model')}): its context is "
            f"{about['context_dim']} wide, this model's {width}"
        )
    return about


# The published checkpoint layout of Personalized Safety Alignment (arXiv 2508.01151), read and written.
#
# `psa_adapter.bin` is a torch file of
#
#     {"psa_adapter": {"<i>.to_k_user.0.weight": (hidden, d_ctx), "<i>.to_v_user.0.weight": (hidden, d_ctx)},
#      "user_proj": {"proj.weight": (d_ctx, D), "proj.bias", "norm.weight", "norm.bias": (d_ctx,)}}
#
# `<i>` counts cross-attention layers in the order of diffusers' `attn_processors`; `user_adapter` is another name of
# `psa_adapter`. The safetensors variant has the same names with `psa_adapter.` and `user_proj.` in front. The layout
# lacks statistics and a null user: its readers project the zero vector instead. It is for one user token. If the
# published code was given another number N, `proj` has N * d_ctx rows, but its attention reads only the first token; we
# do the same.


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
    """The same weights under our names, with neutral statistics and the published null user.

    If the projection makes several tokens, only the first is kept, with a warning, as the published attention reads
    only that one.

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
                raise UserError(
                    f"{file} holds both psa_adapter and user_adapter, two names for the same part: remove one"
                )
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
    # Shapes may be much larger than the stored data (a stride of 0), so they are checked before memory is allocated.
    if weight.ndim != 2 or bias.ndim != 1 or weight.shape[1] > LARGEST_EMBEDDING:
        raise UserError(f"{file}: user_proj.proj is not a linear layer of user embeddings")
    context_dim = next(iter(layers.values()))[1]
    tokens, rest_of_rows = divmod(len(weight), context_dim)
    if tokens > 1 and rest_of_rows == 0 and len(bias) == len(weight):
        warnings.warn(
            f"{file} has {tokens} user tokens, of which the published attention reads only the first: only it is "
            "loaded",
            stacklevel=2,
        )
        weight, bias = weight[:context_dim], bias[:context_dim]
        named["projection.linear.weight"], named["projection.linear.bias"] = weight, bias
    named["projection.mean"], named["projection.std"] = torch.zeros(weight.shape[1]), torch.ones(weight.shape[1])
    named["projection.null_tokens"] = bias[None]  # the projection of the zero vector
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
    # Each is a copy: saving a view would save the whole storage behind it.
    own = {"psa_adapter": layers, "user_proj": users}
    return {
        part: {name: tensor.detach().cpu().float().clone().contiguous() for name, tensor in tensors.items()}
        for part, tensors in own.items()
    }


def save_published(adapter: UserAdapter, file: Path) -> Path:
    """Write `file` in the published layout: a torch file for `.bin`, else safetensors.

    Warns that a learned null user is lost, because the layout cannot store it.

    Raises:
        UserError: the adapter has more than one user token, or the file cannot be written.
    """
    parts = to_published(adapter)
    if not torch.equal(parts["user_proj"]["proj.bias"], adapter.projection.null_tokens.detach().cpu()[0]):
        warnings.warn(
            f"{file}: the published layout cannot store the learned null user; for guidance and for unknown users its "
            "readers use the zero vector instead",
            stacklevel=2,
        )
    if file.suffix == ".bin":
        with atomic_file(file) as out:
            torch.save(parts, out)
        return file
    flat = {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}
    return write_atomic(file, save(flat))


# Tensors from other people's adapter files: no code in them is run, and sizes are checked first.


#: More than the embeddings of any text model.
LARGEST_EMBEDDING = 65_536
#: Bytes of a torch file besides its numbers: names and shapes.
LARGEST_INDEX = 1 << 20
#: What torch's restricted unpickler raises for damaged or hostile files.
_LOAD_ERRORS = (
    RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError, AssertionError, EOFError, OverflowError,
    MemoryError, RecursionError, struct.error, pickle.UnpicklingError, zipfile.BadZipFile, OSError,
)  # fmt: skip


def read_tensors(file: Path, layers: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a `.safetensors` file, or of a torch `.bin` file, and the metadata.

    Nested names of a torch file are joined by dots: `psa_adapter.0.to_k_user.0.weight`.

    Args:
        file: what to read.
        layers: shapes (hidden, d_ctx) of the model's layers, which bound the size of a torch file.

    Raises:
        UserError: the file is damaged, too large, or does not hold only tensors in dictionaries.
    """
    if file.suffix == ".safetensors" and not is_pickled(file):
        return _read_safetensors(file)
    if file.suffix == ".bin" or is_pickled(file):
        return _flatten(_read_torch(file, layers), file), {}
    raise UserError(f"{file}: user adapters are read from .safetensors and .bin files")


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(file, framework="pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
            return tensors, dict(handle.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(not_readable(file, error)) from error


def _read_torch(file: Path, layers: Mapping[str, tuple[int, ...]]) -> Any:
    context_dim = next(iter(layers.values()))[1]
    numbers = sum(2 * hidden * width for hidden, width in layers.values()) + context_dim * (LARGEST_EMBEDDING + 3)
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise UserError(
            f"{file} is not a torch file in the zip format: {error}; save it again with torch.save"
        ) from error
    # The size that torch would unpack, including compressed records.
    size = sum(member.file_size for member in members)
    index = sum(member.file_size for member in members if "/data/" not in member.filename)
    if size > 8 * numbers + LARGEST_INDEX or index > LARGEST_INDEX:
        raise UserError(
            f"{file} would unpack to {size} bytes, more than any adapter of this backbone, so it is not read"
        )
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except _LOAD_ERRORS as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{file} is not a plain file of weights: {first_line[:200]}") from error


def _flatten(loaded: Any, file: Path) -> dict[str, Tensor]:
    if not isinstance(loaded, dict) or not all(isinstance(part, dict) for part in loaded.values()):
        raise UserError(f"{file}: expected dictionaries of tensors, such as psa_adapter and user_proj")
    tensors = {}
    for part, entries in loaded.items():
        for name, tensor in entries.items():
            plain = isinstance(tensor, Tensor) and tensor.layout is torch.strided and tensor.device.type == "cpu"
            if not plain or not tensor.is_floating_point():
                raise UserError(f"{file}: {part}.{name} is not a plain tensor of numbers")
            tensors[f"{part}.{name}"] = tensor.detach()
    return tensors
