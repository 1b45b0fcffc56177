"""CLIP's image preprocessing on tensors: resize, crop, normalise, on the tensors' device and without torchvision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image, Resampling
from torch import Tensor

from lit_safety.core.errors import UserError
from lit_safety.core.text import load_json, read_text

FILE_NAME = "preprocessor_config.json"
#: Pixels of a side, more than any CLIP takes.
LARGEST = 4096
#: PIL's numbers of the two filters that CLIP checkpoints use.
FILTERS = {2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True)
class ClipPreprocess:
    """What `CLIPImageProcessor` does to an RGB image, with its settings from `preprocessor_config.json`."""

    shortest: int | None = 224
    """Length of the shorter side after resizing, in pixels; None: not resized."""
    crop: tuple[int, int] | None = (224, 224)
    """Height and width cut from the middle, with black where the image is smaller; None: not cropped."""
    square: bool = False
    """Resize to shortest x shortest pixels, whatever the image's shape is."""
    mode: str = "bicubic"
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    @classmethod
    def read(cls, file: Path) -> ClipPreprocess:
        """The settings of a checkpoint.

        Raises:
            UserError: the file is missing, or holds settings that this class does not know.
        """
        try:
            config = load_json(read_text(file))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{file}: holds no CLIP preprocessing that can be used ({error!r})") from error
        return cls.of(config, str(file))

    @classmethod
    def of(cls, config: Mapping[str, Any], where: str) -> ClipPreprocess:
        """The settings of a `preprocessor_config.json`.

        Args:
            config: its content.
            where: where it is from, for messages.

        Raises:
            UserError: there are settings that this class does not know.
        """
        try:
            resize, crop = config.get("do_resize", True), config.get("do_center_crop", True)
            size = config.get("size", 224)
            square = isinstance(size, dict) and "shortest_edge" not in size
            if square and size["height"] != size["width"]:
                raise ValueError(f"size {size} is not square")
            shortest = size if isinstance(size, int) else size["height"] if square else size["shortest_edge"]
            cut = config.get("crop_size", 224)
            cut = (cut, cut) if isinstance(cut, int) else (cut["height"], cut["width"])
            if not config.get("do_normalize", True) or not config.get("do_rescale", True):
                raise ValueError("do_normalize and do_rescale must be true")
            if not abs(config.get("rescale_factor", 1 / 255) * 255 - 1) < 1e-3:
                raise ValueError(f"rescale_factor {config['rescale_factor']}; known is 1/255")
            mean, std = (tuple(map(float, config.get(k, given))) for k, given in
                         (("image_mean", cls.mean), ("image_std", cls.std)))  # fmt: skip
            if not all(1 <= side <= LARGEST for side in (shortest, *cut)):
                raise ValueError(f"sides of {shortest} and {cut} pixels; known are 1 to {LARGEST}")
            if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
                raise ValueError(f"image_mean {mean} and image_std {std}: three numbers each, the latter above 0")
            return cls(
                shortest=int(shortest) if resize else None,
                crop=(int(cut[0]), int(cut[1])) if crop else None,
                square=square,
                mode=FILTERS[config.get("resample", 3)],
                mean=mean,
                std=std,
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{where}: holds no CLIP preprocessing that can be used ({error!r})") from error

    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> pixel values (B, 3, h, w) as the vision tower takes them.

        Like PIL, the resized image is rounded to 8 bits, so that features equal those of the usual preprocessing.
        """
        pixels = ((images.float() + 1.0) * 127.5).clamp(0, 255)
        height, width = pixels.shape[-2:]
        if self.shortest is not None:
            size = _resized(height, width, self.shortest, self.square)
            if size != (height, width):
                pixels = F.interpolate(pixels, size, mode=self.mode, antialias=True, align_corners=False)
        pixels = pixels.round().clamp(0, 255) / 255.0
        if self.crop is not None:
            pixels = center_crop(pixels, *self.crop)
        return self._normalised(pixels)

    def images(self, images: Sequence[Image]) -> Tensor:
        """The same for RGB images of any size, resized by PIL itself: the numbers of `CLIPImageProcessorPil`."""
        rows = []
        for image in images:
            if self.shortest is not None:
                height, width = _resized(image.height, image.width, self.shortest, self.square)
                image = image.resize((width, height), Resampling[self.mode.upper()])
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
            rows.append(pixels if self.crop is None else center_crop(pixels, *self.crop))
        return self._normalised((torch.cat(rows).double() / 255).float())

    def _normalised(self, pixels: Tensor) -> Tensor:
        mean, std = (torch.tensor(v, device=pixels.device).view(1, 3, 1, 1) for v in (self.mean, self.std))
        return (pixels - mean) / std


def _resized(height: int, width: int, shortest: int, square: bool) -> tuple[int, int]:
    if square:
        return shortest, shortest
    short, long = min(height, width), max(height, width)
    scaled = int(shortest * long / short)
    return (shortest, scaled) if height <= width else (scaled, shortest)


def center_crop(images: Tensor, height: int, width: int) -> Tensor:
    """The middle of images (B, C, H, W): (B, C, height, width); zeros where an image is smaller."""
    missing_y, missing_x = max(0, height - images.shape[-2]), max(0, width - images.shape[-1])
    if missing_y or missing_x:
        # transformers puts the odd row and column before the image.
        top, left = -(-missing_y // 2), -(-missing_x // 2)
        images = F.pad(images, (left, missing_x - left, top, missing_y - top))
    top, left = (images.shape[-2] - height) // 2, (images.shape[-1] - width) // 2
    return images[..., top : top + height, left : left + width]
