"""Ordinary editing with the evaluated model: each prompt redraws a given image, whole or behind a mask.

It uses diffusers' own image-to-image and inpainting pipelines with the same networks, so that every kind of arm (a
LoRA, a guard, a fused model) also edits.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from lit_safety.core.errors import UserError
from lit_safety.core.hashes import digest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from PIL.Image import Image
    from torch import Tensor

    from lit_safety.drawing.prompts import Prompt


Task = Literal["image_to_image", "inpainting"]
Part = Literal["left", "right", "middle", "all"]
MOST = 256
"""If there are more images, only the first ones are used, because all are held in memory."""


@dataclass(frozen=True)
class Edit:
    """What is edited, and how.

    Raises:
        UserError: the strength is out of its range.
    """

    task: Task
    images: str
    """A folder of images, or shards, whose chosen images of clean pairs are used."""
    strength: float
    """Share of the noise schedule that is drawn again: with 1 only the part outside of a mask is kept."""
    part: Part
    """Inpainting: the part that is drawn again; `middle` is a square of half the side."""

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise UserError(f"--edit_strength {self.strength}: must lie above 0 and not above 1")

    def describe(self) -> dict[str, Any]:
        """All settings that change pixels, with a hash of the images."""
        about = {"task": self.task, "images_sha256": read_images(self.images)[1], "strength": self.strength}
        return about | ({"part": self.part} if self.task == "inpainting" else {})

    def pipeline(self, pipe: Any) -> Any:
        """The editing pipeline of diffusers with the networks of `pipe`, including an adapter in them.

        Raises:
            UserError: diffusers does not have one for this family.
        """
        from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting

        from lit_safety.adapters.user_pipeline import same_users

        family: Any = AutoPipelineForImage2Image if self.task == "image_to_image" else AutoPipelineForInpainting
        try:
            other = family.from_pipe(pipe)
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"--edit {self.task}: diffusers does not have such a pipeline for {type(pipe).__name__} "
                f"({str(error).splitlines()[0]})"
            ) from error
        other.set_progress_bar_config(disable=True)
        if self.task == "inpainting" and getattr(other, "unet", None) is not None:
            other.unet = _ordinary(other.unet, other.vae.config.latent_channels)
        same_users(pipe, other)
        return other

    def inputs(self, pipe: Any, prompts: Sequence[Prompt], resolution: int | None) -> dict[str, Any]:
        """Further inputs of the editing pipeline: square images of the drawing's size, and masks."""
        side = resolution or pipe.unet.config.sample_size * pipe.vae_scale_factor
        images = read_images(self.images)[0]
        given: dict[str, Any] = {
            "image": [_square(images[place_of(prompt, len(images))], side) for prompt in prompts],
            "strength": self.strength,
        }
        if self.task == "inpainting":
            given["mask_image"] = [mask(self.part, side)] * len(prompts)
        return given


def _ordinary(unet: Any, latent_channels: int) -> Any:
    """The same UNet, but its config says 4 channels, even if it has another number, such as the toy world's 8.

    The stock inpainting pipeline reads only this number, to distinguish UNets made for inpainting (9) from ordinary
    ones (4).
    """
    if unet.config.in_channels != latent_channels or latent_channels == 4:
        return unet
    shell = copy.copy(unet)
    shell.register_to_config(in_channels=4)
    return shell


def place_of(prompt: Prompt, count: int) -> int:
    """Which of `count` images a prompt redraws: it depends only on the prompt's text and seed."""
    key = f"{prompt.seed}\0{prompt.prompt}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) % count


@lru_cache(maxsize=2)
def read_images(source: str) -> tuple[list[Image], str]:
    """The first `MOST` images of a folder or of shards, and the sha256 of their files.

    Raises:
        UserError: there are fewer than two, or one cannot be read.
    """
    from lit_safety.drawing.reference_images import Reference

    reference = Reference(source, "--edit_images")
    images = []
    for _, image in reference:
        images.append(image)
        if len(images) == MOST:
            break
    return images, reference.sha256


def mask(part: Part, side: int) -> Image:
    """White where an image is drawn again, black where it is kept; (side, side), 8 bits."""
    from PIL import Image, ImageDraw

    half, quarter = side // 2, side // 4
    boxes = {"left": (0, 0, half, side), "right": (half, 0, side, side), "all": (0, 0, side, side)}
    boxes["middle"] = (quarter, quarter, quarter + half, quarter + half)
    left, top, right, bottom = boxes[part]
    image = Image.new("L", (side, side), 0)
    ImageDraw.Draw(image).rectangle((left, top, right - 1, bottom - 1), fill=255)
    return image


def _square(image: Image, side: int) -> Image:
    from PIL import Image, ImageOps

    from lit_safety.core.images import rgb

    return ImageOps.fit(rgb(image), (side, side), Image.Resampling.LANCZOS)


# What an attacker gives the drawing besides the prompts: start images of his own, or the noise that it begins with.


class GivenImages(Edit):
    """Image-to-image that starts each prompt from an image of its own.

    Args:
        images: by prompt and seed.
        strength: share of the noise schedule that is drawn again.

    Raises:
        UserError: as `Edit`.
    """

    def __init__(self, images: Mapping[tuple[str, int], Image], strength: float) -> None:
        super().__init__("image_to_image", "", strength, "all")
        object.__setattr__(self, "_given", dict(images))

    def describe(self) -> dict[str, Any]:
        rows = [[*key, hashlib.sha256(image.tobytes()).hexdigest()] for key, image in sorted(self._of().items())]
        return {"task": self.task, "strength": self.strength, "given_images_sha256": digest(rows)}

    def inputs(self, pipe: Any, prompts: Sequence[Prompt], resolution: int | None) -> dict[str, Any]:
        """Each prompt's own image, as large as it is: families that are told a size else draw at their own."""
        images = [self._of()[p.prompt, p.seed] for p in prompts]
        told = "height" in inspect.signature(type(pipe).__call__).parameters
        size = {"height": images[0].height, "width": images[0].width} if told else {}
        return {"image": images, "strength": self.strength, **size}

    def _of(self) -> dict[tuple[str, int], Image]:
        return self.__dict__["_given"]


class GivenNoise(Edit):
    """Drawing from text that begins with given noise instead of that of a prompt's seed.

    Args:
        latents: by prompt and seed, a row of what the stock pipeline takes as `latents`.
        side: of the images in pixels.
    """

    def __init__(self, latents: Mapping[tuple[str, int], Tensor], side: int) -> None:
        super().__init__("image_to_image", "", 1.0, "all")
        object.__setattr__(self, "_given", dict(latents))
        object.__setattr__(self, "_side", side)

    def describe(self) -> dict[str, Any]:
        rows = [[*key, hashlib.sha256(row.numpy().tobytes()).hexdigest()] for key, row in sorted(self._of().items())]
        return {"task": "given_noise", "given_noise_sha256": digest(rows)}

    def pipeline(self, pipe: Any) -> Any:
        return pipe

    def inputs(self, pipe: Any, prompts: Sequence[Prompt], resolution: int | None) -> dict[str, Any]:
        """Each prompt's own noise (B, ...), and the size of the image."""
        import torch

        rows = torch.stack([self._of()[p.prompt, p.seed] for p in prompts])
        return {"latents": rows, "height": self.__dict__["_side"], "width": self.__dict__["_side"]}

    def _of(self) -> dict[tuple[str, int], Tensor]:
        return self.__dict__["_given"]
