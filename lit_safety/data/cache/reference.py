"""The reference cache: what the frozen reference would compute at every step, stored once with each pair.

`K.reference.npy` float64 (D, 4 or 6), one row a fixed draw: timestep; the seed of timestep, noise and latent sample;
the reference's errors of chosen and rejected (of a group: of all images); and, if asked for, its errors without the
prompt. `K.reference.prediction.npy` (D, 1 or 2, C, h, w): its predictions on the chosen image of clean-prompt pairs,
which the anchor needs. `.reference.flip.npy` and `.reference.prediction.flip.npy`: the same for the mirrored images,
with the same draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_safety.core.errors import UserError
from lit_safety.data.format.npy import read_npy, write_npy

#: The most draws a pair may have.
MAX_DRAWS = 1024
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


@dataclass(frozen=True)
class ReferenceCache:
    """What a manifest states about the reference's part of a cache."""

    draws: int
    """Fixed draws of timestep and noise for each pair."""
    weights: dict[str, str]
    """Hashes of the denoiser, of the noise schedule and of the scaling of latents (`reference_hashes`)."""
    precision: str = "32-true"
    """The precision that the reference was computed in, in the words of `trainer.precision`."""
    empty: bool = False
    """Whether it also holds the errors without the prompt."""
    predictions: bool = False
    """Whether it also holds the predictions on the chosen images of clean prompts."""

    @property
    def conditions(self) -> int:
        """1: errors with the prompt; 2: also without it."""
        return 2 if self.empty else 1


@dataclass(frozen=True)
class FixedDraw:
    """One draw of timestep and noise for a pair, and the reference's errors for it."""

    seed: int
    """Of timestep, noise and latent sample."""
    timestep: float
    """In the backbone's own unit."""
    errors: Tensor
    """The reference's errors, float32 (2, conditions): chosen and rejected (of a group read whole: all images); with
    the prompt, without it."""
    prediction: Tensor | None = None
    """The reference's prediction on the chosen image, float32 (conditions, C, h, w); zeros for harmful prompts."""


def reference_name(mirror: bool, prediction: bool = False) -> str:
    """The name of the member with the errors or the predictions, of the images as they are or mirrored."""
    return f"reference{'.prediction' if prediction else ''}{'.flip' if mirror else ''}.npy"


def parse_reference(data: Any, where: str) -> ReferenceCache | None:
    """Check a manifest's `cache.reference`.

    Raises:
        UserError: names `where` and what is wrong.
    """
    if data is None:
        return None
    if not isinstance(data, Mapping) or type(draws := data.get("draws")) is not int or not 1 <= draws <= MAX_DRAWS:
        raise UserError(f"{where}: 'draws' must be a whole number from 1 to {MAX_DRAWS}")
    weights = data.get("weights")
    if not isinstance(weights, dict) or not weights or not all(isinstance(one, str) for one in weights.values()):
        raise UserError(f"{where}: 'weights' must name the denoiser's hash; make the cache again")
    if data.get("precision") not in PRECISIONS:
        raise UserError(f"{where}: 'precision' must be one of {', '.join(PRECISIONS)}, not {data.get('precision')!r}")
    return ReferenceCache(
        draws, dict(weights), data["precision"], data.get("empty") is True, data.get("predictions") is True
    )


def encode_reference(
    draws: Sequence[FixedDraw], mirror: bool, dtype: str, predictions: bool, where: str
) -> dict[str, bytes]:
    """One pair's draws as members of a shard; predictions are stored in `dtype`, and only where there are any.

    Raises:
        UserError: something is not finite; names `where`.
    """
    rows = [[one.timestep, one.seed, *one.errors.double().t().flatten().tolist()] for one in draws]
    table = np.array(rows, dtype=np.float64)
    members = {reference_name(mirror): write_npy(table)}
    finite = bool(np.isfinite(table).all())
    if predictions:
        stacked = torch.stack([one.prediction for one in draws if one.prediction is not None])
        stored = stacked.to(getattr(torch, dtype))
        finite = finite and bool(torch.isfinite(stored).all())
        members[reference_name(mirror, prediction=True)] = write_npy(stored.cpu().numpy())
    if not finite:
        raise UserError(f"{where}: the reference's errors or predictions are not finite; the model may be damaged")
    return members


def read_reference(
    members: Mapping[str, bytes],
    cache: ReferenceCache,
    latent: tuple[int, int, int] | None,
    mirror: bool,
    number: int,
    where: str,
    images: int = 2,
    rows: Sequence[int] = (0, 1),
) -> FixedDraw:
    """The `number`-th draw of a sample.

    Args:
        members: the sample's.
        cache: what the manifest states.
        latent: (C, h, w) of the predictions, to read them too. A pair with a harmful prompt gets zeros.
        mirror: of the mirrored images.
        number: which draw.
        where: the sample, for messages.
        images: how many images the sample has.
        rows: of which of them errors are asked for.

    Raises:
        UserError: a member is missing, has another shape, or holds impossible values.
    """
    name = reference_name(mirror)
    if name not in members:
        raise UserError(f"{where}: has no {name}")
    shape = (cache.draws, 2 + images * cache.conditions)
    timestep, seed, *errors = read_npy(members[name], shape, ("float64",), f"{where}: {name}")[number].tolist()
    if (
        not np.isfinite([timestep, seed, *errors]).all()
        or min(errors) < 0
        or not (0 <= seed < 1 << 53 and seed % 1 == 0)
    ):
        raise UserError(f"{where}: {name}: draw {number} is not a timestep, seed and errors")
    found = torch.tensor(errors, dtype=torch.float32).view(cache.conditions, images).t()
    if tuple(rows) != (0, 1) or images != 2:
        found = found[list(rows)]
    return FixedDraw(int(seed), timestep, found, _prediction(members, cache, latent, mirror, number, where))


def _prediction(
    members: Mapping[str, bytes],
    cache: ReferenceCache,
    latent: tuple[int, int, int] | None,
    mirror: bool,
    number: int,
    where: str,
) -> Tensor | None:
    if latent is None:
        return None
    name = reference_name(mirror, prediction=True)
    if name not in members:
        return torch.zeros(cache.conditions, *latent)
    shape = (cache.draws, cache.conditions, *latent)
    found = read_npy(members[name], shape, ("float16", "float32"), f"{where}: {name}")[number]
    tensor = torch.from_numpy(found.astype(np.float32))
    if not torch.isfinite(tensor).all():
        raise UserError(f"{where}: {name}: holds numbers that are not finite")
    return tensor
