"""Drawing with the stock calls of diffusers: text to image, and image to image with the same networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any

from lit_safety.core.errors import UserError
from lit_safety.drawing.pipelines import Precision

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image


@dataclass(frozen=True)
class PainterSettings:
    """How images are drawn with one's own model.

    Args:
        steps: Denoising steps of an image.
        guidance: Scale of classifier-free guidance.
        resolution: Side of the images in pixels; null is the pipeline's own.
        batch_size: Images drawn at once.
        device: Where to draw, such as cpu or cuda:1; null takes this process's GPU where there is one.
        precision: Number format of the weights while drawing.

    Raises:
        UserError: a number with which no pipeline can draw.
    """

    steps: int = 30
    guidance: float = 7.5
    resolution: int | None = None
    batch_size: int = 8
    device: str | None = None
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"--steps {self.steps}: at least 1 step is needed to draw")
        if not 0 <= self.guidance < float("inf"):
            raise UserError(f"--guidance {self.guidance}: must be a number from 0 up")
        if self.resolution is not None and self.resolution < 8:
            raise UserError(f"--resolution {self.resolution}: must be at least 8 pixels")
        if self.batch_size < 1:
            raise UserError(f"--batch_size {self.batch_size}: must be at least 1")


class Painter:
    """A pipeline of diffusers as two functions that give one image, or None where its numbers are not finite.

    Each image's noise comes from a CPU generator of its own seed, so it depends neither on the device nor on its batch
    mates (up to rounding).

    Args:
        pipe: any text-to-image pipeline.
        settings: how it draws.
        image_to_image: also make the image-to-image pipeline of the same family, around the same networks.

    Raises:
        UserError: diffusers knows no image-to-image pipeline of this family.
    """

    def __init__(self, pipe: Any, settings: PainterSettings, image_to_image: bool) -> None:
        self.pipe = pipe
        self.settings = settings
        self._second: Any = _image_to_image(pipe) if image_to_image else None

    def from_text(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image | None]:
        """Draw prompts."""
        side = self.settings.resolution
        size: dict[str, Any] = {} if side is None else {"height": side, "width": side}
        return self._draw(self.pipe, seeds, prompt=list(prompts), **size)

    def from_images(
        self,
        images: Sequence[Image],
        prompts: Sequence[str],
        negatives: Sequence[str],
        strength: float,
        seeds: Sequence[int],
    ) -> list[Image | None]:
        """Redraw images towards `prompts` and away from `negatives` (SDEdit, arXiv 2108.01073).

        Args:
            strength: share of the steps that are taken again; 1 keeps nothing of the image.
        """
        given: dict[str, Any] = {"image": list(images), "prompt": list(prompts)}
        if {"height", "width"} <= signature(type(self._second).__call__).parameters.keys():
            given |= {"height": images[0].height, "width": images[0].width}  # some draw at a size of their own else
        return self._draw(self._second, seeds, negatives, strength=strength, **given)

    def _draw(
        self, pipe: Any, seeds: Sequence[int], negatives: Sequence[str] | None = None, **inputs: Any
    ) -> list[Image | None]:
        import torch

        from lit_safety.backbones.call import call_options

        try:
            pixels = pipe(
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
                num_inference_steps=self.settings.steps,
                output_type="np",
                **call_options(pipe, self.settings.guidance, negatives, len(seeds)),
                **inputs,
            ).images
        except ValueError as error:  # a size or a number of steps that this family does not take
            raise UserError(f"{type(pipe).__name__} does not draw so: {str(error).splitlines()[0]}") from error
        return [_image(one) for one in pixels]


def _image(pixels: np.ndarray) -> Image | None:
    """(H, W, 3) in [0, 1] as an image; None where a number is not finite: it would become black, which looks safe."""
    import numpy as np
    from PIL import Image

    if not np.isfinite(pixels).all():
        return None
    return Image.fromarray((pixels * 255).round().clip(0, 255).astype(np.uint8))


def _image_to_image(pipe: Any) -> Any:
    from diffusers import AutoPipelineForImage2Image

    try:
        second = AutoPipelineForImage2Image.from_pipe(pipe)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{type(pipe).__name__}: diffusers has no image-to-image pipeline of this family "
            f"({str(error).splitlines()[0]}); use --counterpart same_seed"
        ) from error
    second.set_progress_bar_config(disable=True)
    return second
