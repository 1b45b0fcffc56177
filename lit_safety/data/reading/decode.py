"""From a sample's bytes to its tensors: metadata is checked, images are bounded, resized and mirrored, or cached."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lit_safety.core.chance import sample_seed, turn, uniform
from lit_safety.core.errors import UserError
from lit_safety.core.images import FORMATS, decode_image
from lit_safety.data.format.sample import SIDES, PairMetadata, parse_metadata
from lit_safety.data.format.tar_index import BadSample
from lit_safety.data.reading.batch import Pair, to_floats

if TYPE_CHECKING:
    from lit_safety.data.cache.cache import Cache
    from lit_safety.data.cache.prompt_table import PromptTables
    from lit_safety.data.cache.reference import FixedDraw

_IMAGES = re.compile(rf"json|({'|'.join(SIDES)}|\d{{1,4}})\.({'|'.join(FORMATS)})")

#: White where chosen and rejected differ.
MASK = "mask.png"


@dataclass(frozen=True)
class PairDecoder:
    """How samples become tensors; the same for chosen and rejected."""

    seed: int
    resolution: int | None = None
    """The shorter side is scaled to this many pixels, and the middle is cut out as a square; None: as stored."""
    flip: bool = False
    """Mirror half of the pairs, always both images."""
    cache: Cache | None = None
    """The shards' cache; None: images are decoded."""
    prompts: PromptTables | None = None
    """The text encoders' outputs, if latents are cached."""
    predictions: bool = False
    """Also read the reference's predictions, if its errors are cached."""
    labels_only: bool = False
    """Read only the metadata, if a module has stored what it needs from the images."""
    masked: bool = False
    """Read the mask of where chosen and rejected differ."""
    whole: bool = False
    """Read all images of a group, instead of the best and the worst."""
    scaled: bool = False
    """Decode JPEGs at a part of their size where that covers what they are scaled to."""

    def wants(self, suffix: str) -> bool:
        """Whether a member of a sample is needed."""
        if self.labels_only:
            return suffix == "json"
        if suffix == MASK:
            return self.masked
        if self.cache is None:
            return _IMAGES.fullmatch(suffix) is not None
        from lit_safety.data.cache.cache import cached_members

        pattern = cached_members(self.flip, self.cache.reference is not None, self.predictions)
        return pattern.fullmatch(suffix) is not None

    def empty(self) -> dict[str, Tensor] | None:
        """The text encoders' outputs for the empty prompt, 1 row each, if they are cached."""
        return None if self.prompts is None else self.prompts.empty()

    def __call__(
        self, key: str, members: dict[str, bytes], epoch: int, where: str, size: tuple[int, int] | None = None
    ) -> Pair:
        """Decode one sample.

        Args:
            key: its key.
            members: its bytes by suffix.
            epoch: which pass over the data this is.
            where: shard and key, for messages.
            size: height and width that both images are scaled and cut to; None: the square of `resolution`.

        Raises:
            BadSample: an image, the metadata or a cached member is missing or cannot be used.
        """
        seed = sample_seed(self.seed, epoch, key)
        mirror = self.flip and uniform(seed, "flip") < 0.5
        if self.labels_only:
            return Pair(key, seed, pair_metadata(members, where), None, None, where)
        if self.cache is None:
            if size is None and self.resolution is not None:
                size = (self.resolution, self.resolution)
            metadata, images = sample_images(members, where, self.whole, size if self.scaled else None)
            stored = [image.info.get("stored_size", (image.height, image.width)) for image in images]
            tensors = [_tensor(image, mirror, size) for image in images]
            crops = torch.tensor([crop_of(one, size) for one in stored])
            if self.whole:
                if len({one.shape for one in tensors}) > 1:
                    raise BadSample(f"{where}: its images are of different sizes: set data.init_args.resolution")
                return Pair(key, seed, metadata, None, None, where, crops, images=torch.stack(tensors), whole=True)
            chosen, rejected = tensors
            mask = self._mask(members, crops, mirror, where)
            return Pair(key, seed, metadata, chosen, rejected, where, crops, mask=mask)
        from lit_safety.data.cache.cache import cached_tensors

        metadata = pair_metadata(members, where)
        names = metadata.names
        rows = range(len(names)) if self.whole else metadata.sides
        try:
            latents, crops = cached_tensors(members, self.cache, mirror, where, names, rows)
            conditioning = None if self.prompts is None else self.prompts.get(metadata.prompt, where)
            draw = self._draw(self.cache, key, members, epoch, mirror, where, len(names), rows)
        except UserError as error:
            raise BadSample(str(error)) from error
        mask = self._mask(members, crops, mirror, where)
        return Pair(
            key, seed, metadata, None, None, where, crops, latents, conditioning, draw, whole=self.whole, mask=mask
        )

    def _mask(self, members: dict[str, bytes], crops: Tensor, mirror: bool, where: str) -> Tensor | None:
        """The sample's mask, cut as its images are; None where none is read."""
        if not self.masked or MASK not in members:
            return None
        from lit_safety.data.reading.masks import read_mask

        try:
            return read_mask(members[MASK], crops, mirror, f"{where}: {MASK}")
        except UserError as error:
            raise BadSample(str(error)) from error

    def _draw(
        self,
        cache: Cache,
        key: str,
        members: dict[str, bytes],
        epoch: int,
        mirror: bool,
        where: str,
        images: int,
        rows: Sequence[int],
    ) -> FixedDraw | None:
        """The fixed draw of this pass with the reference's errors; None: the reference is not cached."""
        if cache.reference is None:
            return None
        from lit_safety.data.cache.reference import read_reference

        number = turn(self.seed, epoch, key, cache.reference.draws)
        latent = cache.latent if self.predictions else None
        return read_reference(members, cache.reference, latent, mirror, number, where, images, rows)


def _tensor(image: Image.Image, mirror: bool, size: tuple[int, int] | None) -> Tensor:
    if size is not None and image.size != size[::-1]:
        image = ImageOps.fit(image, size[::-1], Image.Resampling.LANCZOS)
    if mirror:
        image = ImageOps.mirror(image)
    return pixels(image)


def crop_of(stored: tuple[int, int], size: tuple[int, int] | None) -> tuple[float, ...]:
    """Height and width as stored, top and left of the crop in the scaled image, height and width of the crop.

    The image is scaled until it just covers the crop, which is in the middle, so mirroring does not change it.

    Args:
        stored: height and width of the image.
        size: height and width of the crop; None: the whole image.
    """
    height, width = stored
    if size is None:
        return (height, width, 0.0, 0.0, height, width)
    if size[1] * height >= size[0] * width:  # its width fits exactly, and its height is cut
        scaled = height * size[1] / width, float(size[1])
    else:
        scaled = float(size[0]), width * size[0] / height
    return (height, width, round((scaled[0] - size[0]) / 2), round((scaled[1] - size[1]) / 2), *size)


def pair_metadata(members: dict[str, bytes], where: str) -> PairMetadata:
    """The metadata of a sample, checked.

    Raises:
        BadSample: it is missing or cannot be used.
    """
    try:
        if "json" not in members:
            raise UserError(f"{where}: lacks its json")
        return parse_metadata(members["json"], where)
    except UserError as error:
        raise BadSample(str(error)) from error


def pair_images(members: dict[str, bytes], where: str) -> tuple[PairMetadata, Image.Image, Image.Image]:
    """The metadata, the chosen and the rejected image of a sample, checked and as stored; a group's best and worst.

    Raises:
        BadSample: one of them is missing or cannot be used.
    """
    metadata, (chosen, rejected) = sample_images(members, where, whole=False)
    return metadata, chosen, rejected


def sample_images(
    members: dict[str, bytes], where: str, whole: bool = True, cover: tuple[int, int] | None = None
) -> tuple[PairMetadata, list[Image.Image]]:
    """The metadata and the images of a sample, checked and as stored: all of them, or with ``whole`` false two.

    ``cover`` is `decode_image`'s.

    Raises:
        BadSample: one of them is missing or cannot be used.
    """
    metadata = pair_metadata(members, where)
    names = metadata.names
    try:
        stored = image_bytes(members, metadata, where)
        rows = range(len(names)) if whole else metadata.sides
        images = [decode_image(stored[row], f"{where}: {names[row]}", cover=cover) for row in rows]
    except UserError as error:
        raise BadSample(str(error)) from error
    return metadata, images


def image_bytes(members: dict[str, bytes], metadata: PairMetadata, where: str) -> list[bytes]:
    """The bytes of all images of a sample, in the order of `PairMetadata.names`.

    Raises:
        UserError: one is missing, stands there twice, or is one more than the metadata says.
    """
    names = metadata.names
    if metadata.images:
        for member in members:
            number = member.split(".", 1)[0]
            if (number.isdigit() and number not in names) or number in SIDES:
                raise UserError(f"{where}: holds {member}, and its metadata says 0 to {len(names) - 1} (`images`)")
    return [_image_bytes(members, name, where) for name in names]


def _image_bytes(members: dict[str, bytes], name: str, where: str) -> bytes:
    found = [one for one in members if one.startswith(f"{name}.") and one.split(".", 1)[1] in FORMATS]
    if not found:
        raise UserError(f"{where}: lacks its {name} image")
    if len(found) > 1:
        raise UserError(f"{where}: has {len(found)} {name} images ({', '.join(sorted(found))})")
    return members[found[0]]


def pixels(image: Image.Image) -> Tensor:
    """An RGB image as uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).contiguous()


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as float32 (3, H, W) in [-1, 1]."""
    return to_floats(pixels(image))
