"""From a sample's bytes to its tensors: metadata checked, images bounded, resized, perhaps mirrored."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lit_safety.data.batch import Pair
from lit_safety.data.chance import sample_seed, uniform
from lit_safety.data.images import FORMATS, decode_image
from lit_safety.data.sample import SIDES, PairMetadata, parse_metadata
from lit_safety.data.tarindex import BadSample
from lit_safety.errors import UserError


@dataclass(frozen=True)
class PairDecoder:
    """How samples become tensors; the same for chosen and rejected."""

    seed: int
    resolution: int | None = None
    """Images are scaled until the shorter side has this many pixels and cut square from the middle; None: as
    stored."""
    flip: bool = False
    """Mirror half of the pairs, both images alike."""

    def __call__(self, key: str, members: dict[str, bytes], epoch: int, where: str) -> Pair:
        """Decode one sample.

        Raises:
            BadSample: an image or the metadata is missing or cannot be used.
        """
        metadata, *images = pair_images(members, where)
        seed = sample_seed(self.seed, epoch, key)
        mirror = self.flip and uniform(seed, "flip") < 0.5
        chosen, rejected = (self._tensor(image, mirror) for image in images)
        return Pair(key, seed, metadata, chosen, rejected, where)

    def _tensor(self, image: Image.Image, mirror: bool) -> Tensor:
        if self.resolution is not None and image.size != (self.resolution, self.resolution):
            image = ImageOps.fit(image, (self.resolution, self.resolution), Image.Resampling.LANCZOS)
        if mirror:
            image = ImageOps.mirror(image)
        return to_tensor(image)


def pair_images(members: dict[str, bytes], where: str) -> tuple[PairMetadata, Image.Image, Image.Image]:
    """The metadata, the chosen and the rejected image of a sample, checked and as stored.

    Raises:
        BadSample: one of them is missing or cannot be used.
    """
    try:
        if "json" not in members:
            raise UserError(f"{where}: has no json")
        metadata = parse_metadata(members["json"], where)
        chosen, rejected = (decode_image(_image_bytes(members, side, where), f"{where}: {side}") for side in SIDES)
    except UserError as error:
        raise BadSample(str(error)) from error
    return metadata, chosen, rejected


def _image_bytes(members: dict[str, bytes], side: str, where: str) -> bytes:
    found = [name for name in members if name.startswith(f"{side}.") and name.split(".", 1)[1] in FORMATS]
    if not found:
        raise UserError(f"{where}: has no {side} image")
    if len(found) > 1:
        raise UserError(f"{where}: has {len(found)} {side} images ({', '.join(sorted(found))})")
    return members[found[0]]


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as float32 (3, H, W) in [-1, 1]."""
    array = np.array(image, dtype=np.uint8)
    return torch.from_numpy(array).permute(2, 0, 1).contiguous().float().div_(127.5).sub_(1.0)
