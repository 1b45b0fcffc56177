"""What a cached sample holds instead of (or beside) its images.

`K.chosen.latent.npy`, `K.rejected.latent.npy` (2, C, h, w): mean and standard deviation of the image's latents,
unscaled; `.latent.flip.npy` the same of the mirrored image; `K.crops.npy` int32 (2, 6): how each image was cut.
What a reference cache adds stands in `reference_cache.py`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_safety.data.cache import TYPES, Cache
from lit_safety.data.npy import read_npy, write_npy
from lit_safety.data.reference_cache import reference_name
from lit_safety.data.sample import SIDES
from lit_safety.errors import UserError

CROPS = "crops.npy"


def latent_name(side: str, mirror: bool) -> str:
    """The member that holds a side's latents, as it is or mirrored."""
    return f"{side}.latent{'.flip' if mirror else ''}.npy"


@functools.cache
def cached_members(flip: bool, reference: bool = False, predictions: bool = False) -> re.Pattern[str]:
    """The members of a cached sample that are read."""
    mirrors = {False, flip}
    names = ["json", CROPS, *(latent_name(side, mirror) for side in SIDES for mirror in mirrors)]
    names += [reference_name(mirror) for mirror in mirrors if reference]
    names += [reference_name(mirror, prediction=True) for mirror in mirrors if reference and predictions]
    return re.compile("|".join(map(re.escape, names)))


def has_latents_only(members: Mapping[str, bytes]) -> bool:
    """Whether a sample holds latents and no images."""
    images = any(name.split(".", 1)[0] in SIDES and not name.endswith(".npy") for name in members)
    return latent_name(SIDES[0], False) in members and not images


def encode_latents(latents: Tensor, mirror: bool, dtype: str, where: str) -> dict[str, bytes]:
    """One pair's latents (2, 2, C, h, w) as members of a shard.

    Raises:
        UserError: they are not finite in ``dtype``; names `where`.
    """
    members = {}
    for side, one in zip(SIDES, latents, strict=True):
        stored = one.to(getattr(torch, dtype))
        if not torch.isfinite(stored).all():
            cure = "; float32 holds them: --dtype float32" if torch.isfinite(one).all() else ""
            raise UserError(f"{where}: the latents of {side} are not finite in {dtype}{cure}")
        members[latent_name(side, mirror)] = write_npy(stored.cpu().numpy())
    return members


def encode_crops(crops: Tensor) -> dict[str, bytes]:
    """One pair's crops (2, 6) as a member of a shard."""
    return {CROPS: write_npy(crops.numpy().astype(np.int32))}


def cached_tensors(members: dict[str, bytes], cache: Cache, mirror: bool, where: str) -> tuple[Tensor, Tensor]:
    """A cached sample's latents, float32 (2, 2, C, h, w), and crops, float32 (2, 6).

    Raises:
        UserError: something is missing, of another type or shape, or not finite; names `where` and the member.
    """
    sides = []
    for side in SIDES:
        name = latent_name(side, mirror)
        if name not in members:
            raise UserError(f"{where}: has no {name}")
        place = f"{where}: {name}"
        sides.append(_finite(read_npy(members[name], (2, *cache.latent), TYPES, place), place))
    height, width = cache.size
    crops = np.array([[height, width, 0, 0, height, width]] * 2, dtype=np.float32)
    if CROPS in members:
        crops = read_npy(members[CROPS], (2, 6), ("int32",), f"{where}: {CROPS}").astype(np.float32)
    return torch.stack(sides), torch.from_numpy(crops)


def _finite(array: NDArray[np.generic], where: str) -> Tensor:
    tensor = torch.from_numpy(array.astype(np.float32))
    if not torch.isfinite(tensor).all():
        raise UserError(f"{where}: is not finite")
    if (tensor[1] < 0).any():
        raise UserError(f"{where}: has a standard deviation below 0")
    return tensor
