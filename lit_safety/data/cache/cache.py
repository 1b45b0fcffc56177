"""What a cached set of shards states about the model that made it: `cache` in the manifest.

Cached shards hold latents (posterior mean and standard deviation), with or without the images, and
`prompts.safetensors` next to the manifest holds the text encoders' outputs. They are correct only for one pair of
encoders and one resolution. So both are stored and compared before anything is loaded.
"""

from __future__ import annotations

import functools
import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_safety.core.errors import UserError
from lit_safety.data.cache.reference import ReferenceCache, parse_reference, reference_name
from lit_safety.data.format.npy import read_npy, write_npy
from lit_safety.data.format.sample import SIDES

VERSION = 2
"""Version 1 hashed only the ends of tensors, and not the settings of tokenizers, scaling and noise schedule."""
#: The file next to the manifest that holds the text encoders' outputs.
PROMPTS = "prompts.safetensors"
TYPES = ("float16", "float32")
#: The most numbers one side's mean and standard deviation may have: 16 channels of a 4096 x 4096 image.
MAX_NUMBERS = 2 * 16 * 512 * 512


@dataclass(frozen=True)
class Cache:
    """The fingerprint of a cached set."""

    model: str
    """The pipeline that made it, as `--model` named it."""
    weights: dict[str, str]
    """Hashes of its encoders by component, weights and settings (`Backbone.encoder_hashes`)."""
    size: tuple[int, int]
    """Height and width in pixels of the images that were encoded."""
    latent: tuple[int, int, int]
    """(C, h, w) of their latents."""
    flip: bool = False
    """Whether it also holds the latents of mirrored images."""
    dtype: str = "float16"
    """How latents and text are stored: float16 or float32."""
    images: bool = False
    """Whether it also holds the images."""
    text: bool = True
    """Whether it also holds the text encoders' outputs. Without them a training encodes its prompts itself."""
    truncated: int = 0
    """How many different prompts are too long for a text encoder."""
    first_truncated: str | None = None
    """The first of them."""
    prompts: dict[str, Any] = field(default_factory=dict)
    """Size and SHA-256 of `prompts.safetensors`: `{"bytes": ..., "sha256": ...}`."""
    reference: ReferenceCache | None = None
    """What is stored of the reference's errors; None: they are not stored."""

    def to_dict(self) -> dict[str, Any]:
        stated = {"version": VERSION, **asdict(self), "size": list(self.size), "latent": list(self.latent)}
        if self.reference is None:
            del stated["reference"]
        if self.text:  # manifests of before it could be left out say nothing of it
            del stated["text"]
        return stated

    def __str__(self) -> str:
        hashes = ", ".join(f"{name} {found[:8]}" for name, found in self.weights.items())
        return f"{self.model} ({hashes}) at {pixels(self.size)}"


def made_by(weights: Mapping[str, str]) -> str:
    """Hashes of encoders as the cache of prompts stores them."""
    return json.dumps(dict(weights), sort_keys=True)


def is_of_text(component: str) -> bool:
    """Whether a component of `Backbone.ENCODERS` decides the text encoders' outputs."""
    return component.startswith(("text_encoder", "tokenizer"))


def pixels(size: tuple[int, int]) -> str:
    """`"512 x 512 pixels"`, width first; size: (height, width)."""
    return f"{size[1]} x {size[0]} pixels"


def parse_cache(data: Mapping[str, Any], where: str) -> Cache:
    """Check a manifest's `cache`.

    Raises:
        UserError: names `where` and the field.
    """

    def numbers(name: str, count: int) -> tuple[int, ...]:
        value = data.get(name)
        good = isinstance(value, list) and len(value) == count and all(type(one) is int and one > 0 for one in value)
        if not good:
            raise UserError(f"{where}: {name!r} must hold {count} positive whole numbers, not {value!r}")
        return tuple(value or ())

    def texts(name: str) -> dict[str, str]:
        value = data.get(name)
        if not isinstance(value, dict) or not all(isinstance(one, str) for one in value.values()):
            raise UserError(f"{where}: {name!r} must be an object of texts, not {value!r}")
        return dict(value)

    if data.get("version") != VERSION:
        raise UserError(
            f"{where}: is of version {data.get('version')!r}, and this program reads version {VERSION}, because "
            f"others do not state enough about the model that made them; make it again: `{remake(data)}`"
        )
    if data.get("dtype") not in TYPES:
        raise UserError(f"{where}: 'dtype' must be {' or '.join(TYPES)}, not {data.get('dtype')!r}")
    latent, size = numbers("latent", 3), numbers("size", 2)
    if 2 * latent[0] * latent[1] * latent[2] > MAX_NUMBERS:
        raise UserError(f"{where}: latents of shape {latent} are over the limit of {MAX_NUMBERS} numbers")
    first = data.get("first_truncated")
    cut = data.get("truncated", 0)
    prompts = data.get("prompts")
    if not texts("weights"):
        raise UserError(f"{where}: 'weights' does not name an encoder, so its model is not known; make "
                        "it again with `shards precompute`")  # fmt: skip
    return Cache(
        model=str(data.get("model")),
        weights=texts("weights"),
        size=(size[0], size[1]),
        latent=(latent[0], latent[1], latent[2]),
        flip=data.get("flip") is True,
        dtype=str(data["dtype"]),
        images=data.get("images") is True,
        text=data.get("text") is not False,
        truncated=cut if type(cut) is int else 0,
        first_truncated=first if isinstance(first, str) else None,
        prompts=prompts if isinstance(prompts, dict) else {},
        reference=parse_reference(data.get("reference"), f"{where}: reference"),
    )


def remake(data: Mapping[str, Any]) -> str:
    """The command that makes a cache again, with the settings that its manifest states."""
    words = [
        "shards",
        "precompute",
        "FOLDER_WITH_IMAGES",
        "--model",
        shlex.quote(str(data.get("model"))),
        "--out",
        "NEW",
    ]
    size = data.get("size")
    if isinstance(size, list) and len(size) == 2 and size[0] == size[1] and type(size[0]) is int:
        words += ["--resolution", str(size[0])]
    if data.get("dtype") == "float32":
        words += ["--dtype", "float32"]
    words += ["--flip", "true"] * (data.get("flip") is True)
    words += ["--keep_images", "true"] * (data.get("images") is True)
    words += ["--text", "false"] * (data.get("text") is False)
    reference = data.get("reference")
    if isinstance(reference, Mapping) and type(reference.get("draws")) is int:
        words += ["--reference_draws", str(reference["draws"])]
        words += ["--reference_dropout", "true"] * (reference.get("empty") is True)
        words += ["--reference_predictions", "true"] * (reference.get("predictions") is True)
        words += ["--reference_precision", shlex.quote(str(reference.get("precision")))]
    return " ".join(words)


def truncation(cache: Mapping[str, Any]) -> str | None:
    """In words, how many prompts of a cached set are too long for a text encoder; None if there are none."""
    if not cache.get("truncated"):
        return None
    return truncation_words(cache["truncated"], str(cache.get("first_truncated")))


def truncation_words(count: int, first: str) -> str:
    """In words, how many prompts are too long for a text encoder."""
    what = "prompt is" if count == 1 else "prompts are"
    return f"{count} {what} longer than the text encoder reads: cut, the end token kept; first: {first!r}"


def check_resolution(cache: Cache, resolution: int | None, flip: bool, where: str, key: str) -> None:
    """Refuse a cache that does not fit a run's settings.

    Raises:
        UserError: names the cache's setting and the run's.
    """
    if resolution is not None and cache.size != (resolution, resolution):
        raise UserError(
            f"{where}: the cache was made at {pixels(cache.size)} by {cache.model}, but {key}.resolution is "
            f"{resolution}; make it again with `shards precompute --resolution {resolution}`, or set "
            f"{key}.use_cache to false if the images are there"
        )
    if flip and not cache.flip:
        raise UserError(
            f"{where}: {key}.flip is true, but the cache does not hold mirrored latents; make it again with "
            "`shards precompute --flip true`, or set flip to false"
        )


def check_model(cache: Cache, model: str, weights: Mapping[str, str], where: str) -> list[str]:
    """Refuse a cache that other encoders than those of ``model`` made; returns components that could not be compared.

    Args:
        cache: what the manifest states.
        model: the model of the run, as its YAML names it.
        weights: hashes of its encoders, without those whose files are missing.
        where: the shards, for messages.

    Raises:
        UserError: names the model that made it and the model of the run.
    """
    for name, made in cache.weights.items():
        if name in weights and weights[name] != made:
            raise UserError(
                f"{where}: the cache was made by {cache.model} ({name} {made[:8]}), but this run's model is {model} "
                f"({name} {weights[name][:8]}); make it again with `shards precompute --model {model}`, or name that "
                "model"
            )
    wanted = [name for name in weights if cache.text or not is_of_text(name)]
    if more := [name for name in wanted if name not in cache.weights]:
        raise UserError(
            f"{where}: the cache was made by {cache.model} and lacks the outputs of the {more[0]} of this run's model "
            f"{model}; make it again with `shards precompute --model {model}`, or name that model"
        )
    return [name for name in cache.weights if name not in weights]


# What a cached sample holds instead of its images, or in addition to them.
#
# `K.chosen.latent.npy`, `K.rejected.latent.npy` (2, C, h, w): mean and standard deviation of the image's latents,
# unscaled; `.latent.flip.npy` the same for the mirrored image; `K.crops.npy` int32 (2, 6): how each image was cut.
# What a reference cache adds is described in `reference.py`.


CROPS = "crops.npy"


def latent_name(side: str, mirror: bool) -> str:
    """The member that holds a side's latents, as it is or mirrored."""
    return f"{side}.latent{'.flip' if mirror else ''}.npy"


@functools.cache
def cached_members(flip: bool, reference: bool = False, predictions: bool = False) -> re.Pattern[str]:
    """The members of a cached sample that are read."""
    mirrors = {False, flip}
    names = ["json", CROPS, *(latent_name(side, mirror) for side in SIDES for mirror in mirrors)]
    numbered = [rf"\d{{1,4}}{re.escape(latent_name('', mirror))}" for mirror in mirrors]
    names += [reference_name(mirror) for mirror in mirrors if reference]
    names += [reference_name(mirror, prediction=True) for mirror in mirrors if reference and predictions]
    return re.compile("|".join([*map(re.escape, names), *numbered]))


def has_latents_only(members: Mapping[str, bytes]) -> bool:
    """Whether a sample holds latents but not its images."""
    sides = (*SIDES, "0")
    images = any(name.split(".", 1)[0] in sides and not name.endswith(".npy") for name in members)
    return not images and any(latent_name(side, False) in members for side in ("0", SIDES[0]))


def encode_latents(
    stored: Tensor, finite: Sequence[bool], mirror: bool, where: str, names: Sequence[str] = SIDES
) -> dict[str, bytes]:
    """The latents of a sample's n images as members of a shard.

    Args:
        stored: (n, 2, C, h, w), on the CPU, in the type in which they are stored.
        finite: (n,) whether an image's latents were finite in float32.
        mirror: whether they are those of the mirrored images.
        where: the sample, for messages.
        names: what its images are called.

    Raises:
        UserError: they are not finite; names `where`.
    """
    members = {}
    for side, one, was_finite in zip(names, stored, finite, strict=True):
        if not torch.isfinite(one).all():
            dtype = str(one.dtype).removeprefix("torch.")
            cure = "; float32 holds them: --dtype float32" if was_finite else ""
            raise UserError(f"{where}: the latents of {side} are not finite in {dtype}{cure}")
        members[latent_name(side, mirror)] = write_npy(one.numpy())
    return members


def encode_crops(crops: Tensor) -> dict[str, bytes]:
    """The crops (n, 6) of a sample's n images as a member of a shard."""
    return {CROPS: write_npy(crops.numpy().astype(np.int32))}


def cached_tensors(
    members: dict[str, bytes],
    cache: Cache,
    mirror: bool,
    where: str,
    names: Sequence[str] = SIDES,
    rows: Sequence[int] = (0, 1),
) -> tuple[Tensor, Tensor]:
    """The latents, float32 (n, 2, C, h, w), and crops, float32 (n, 6), of the n images of a cached sample that are
    asked for.

    Args:
        members: the sample's.
        cache: what the manifest says.
        mirror: of the mirrored images.
        where: the sample, for messages.
        names: what its images are called.
        rows: which of them are asked for.

    Raises:
        UserError: something is missing, of another type or shape, or not finite; names `where` and the member.
    """
    shape = (2, *cache.latent)
    latents = torch.empty(len(rows), *shape)
    for place, row in enumerate(rows):
        name = latent_name(names[row], mirror)
        if name not in members:
            raise UserError(f"{where}: has no {name}")
        said = f"{where}: {name}"
        one = latents[place].copy_(as_tensor(read_npy(members[name], shape, TYPES, said)))
        if not all_finite(one):
            raise UserError(f"{said}: holds numbers that are not finite")
        if one[1].min() < 0:
            raise UserError(f"{said}: has a standard deviation below 0")
    height, width = cache.size
    crops = np.array([[height, width, 0, 0, height, width]] * len(names), dtype=np.float32)
    if CROPS in members:
        crops = read_npy(members[CROPS], (len(names), 6), ("int32",), f"{where}: {CROPS}").astype(np.float32)
    return latents, torch.from_numpy(crops if [*rows] == [*range(len(names))] else crops[list(rows)])


def as_tensor(array: NDArray[np.generic]) -> Tensor:
    """A copy: the bytes that were read must not be written. Torch turns half precision into single several times as
    fast as numpy does, to the same numbers."""
    return torch.tensor(array)


def all_finite(tensor: Tensor) -> bool:
    """Whether no number of a float32 tensor is nan or infinite.

    Each such number makes the sum nan or infinite, and a sum costs a fraction of the comparison. Sums of large numbers
    may be infinite too; only then each number is looked at.
    """
    return math.isfinite(tensor.sum()) or bool(torch.isfinite(tensor).all())
