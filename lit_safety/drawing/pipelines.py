"""Any diffusers text-to-image pipeline: load it with an arm's adapter, and draw by its stock calls.

It draws from text, or from an image with the same networks.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lit_safety.core.errors import UserError
from lit_safety.core.progress import quiet_libraries

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from lit_safety.drawing.arms import Arm


Precision = Literal["float32", "float16", "bfloat16"]


def local_pipeline(source: str, key: str = "--pipeline") -> Path:
    """The folder of a pipeline. A pipeline from the hub is downloaded first.

    Args:
        source: a folder or a hub id.
        key: the option or YAML key that it was given by, for messages.

    Raises:
        UserError: it is not a pipeline, or the hub denies access; says how to log in.
    """
    quiet_libraries()
    from lit_safety.backbones.parts import Parts

    return Parts(source, key=key).fetch()


def arm_pipeline(name: str, arm: Arm, base: str) -> Path:
    """The folder of the pipeline that an arm draws with: its own, or the base's.

    Raises:
        UserError: as `local_pipeline`.
    """
    if arm.pipeline is None:
        return local_pipeline(base)
    return local_pipeline(arm.pipeline, f"the `pipeline` of the arm {name}")


def load_pipeline(folder: Path, arm: Arm, device: str = "cpu", precision: Precision = "float32") -> Any:
    """A pipeline on `device` that draws with DDIM if it can, without progress bars.

    It holds the arm's UNet and adapter. A safety checker inside the pipeline is removed: it replaces images by black
    ones, which count as safe.

    Raises:
        UserError: the pipeline does not load, or the adapter is missing or made for another backbone.
    """
    quiet_libraries()
    import torch
    from diffusers import DDIMScheduler

    from lit_safety.backbones.parts import Parts
    from lit_safety.core.hardware import check_precision

    check_precision(precision, device, "--precision")
    parts = Parts(str(folder), getattr(torch, precision))
    if arm.unet is not None:
        from lit_safety.drawing.unets import put_unet

        put_unet(parts, arm.unet, arm.unet_partial)
    pipe = parts.pipeline()
    pipe.set_progress_bar_config(disable=True)
    # SANA's scheduler is compatible only by class: DDIM does not support flow matching.
    process = getattr(pipe.scheduler, "config", {}).get("prediction_type", "epsilon")
    if DDIMScheduler in getattr(pipe.scheduler, "compatibles", []) and process != "flow_prediction":
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    try:
        pipe.to(device)
    except (RuntimeError, AssertionError) as error:  # torch's errors for a device that is missing or too small
        raise UserError(f"--device {device}: the pipeline cannot be moved there: {_first_line(error)}") from error
    loras = arm.loras()
    if loras:
        from lit_safety.adapters.load_lora import load_lora

        names = {path: f"lora_{number}" for number, path in enumerate(loras)}
        for path, name in names.items():
            load_lora(pipe, path, scale=loras[path], name=name)
        pipe.set_adapters(list(names.values()), [loras[path] for path in names])
    for_users = arm.user_adapter()
    if for_users is not None:
        from lit_safety.adapters.user_pipeline import load_psa

        load_psa(pipe, for_users[0], scale=for_users[1], users=arm.users)
    if precision == "float32" and (loras or for_users is not None):
        from lit_safety.adapters.load_lora import fuse_loras

        fuse_loras(pipe)  # exact enough, and as fast as without an adapter
    for name in ("unet", "vae"):
        network = getattr(pipe, name, None)
        if network is not None and all(weight.ndim <= 4 for weight in network.parameters()):  # not for video networks
            network.to(memory_format=torch.channels_last)
    if arm.guard is not None:
        arm.guard.check(pipe)
    elif hasattr(pipe, "text_encoder_3") and pipe.text_encoder_3 is None:
        from lit_safety.backbones.stable_diffusion_3 import count_missing_t5

        count_missing_t5(pipe)
    return pipe


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def check_writable(out: Path) -> None:
    """Refuse, before long work begins, an `out` that a report cannot be written to.

    Raises:
        UserError: `out` is a file, or the nearest folder that exists cannot be written to.
    """
    nearest = next(folder for folder in (out, *out.resolve().parents) if folder.exists())
    if not nearest.is_dir():
        raise UserError(f"--out {out}: {nearest} is a file; give a folder")
    if not os.access(nearest, os.W_OK):
        raise UserError(f"--out {out}: no permission to write in {nearest}; give another folder")


@dataclass(frozen=True)
class PainterSettings:
    """How images are drawn with the user's own model.

    Args:
        steps: Denoising steps of an image.
        guidance: Scale of classifier-free guidance.
        resolution: Side of the images in pixels; null is the pipeline's own.
        batch_size: Images drawn at once.
        device: The device, such as cpu or cuda:1; null: this process's GPU if there is one.
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
    """A pipeline of diffusers as two functions. An image whose numbers are not finite is None.

    Each image's noise comes from a CPU generator with its own seed, so it depends neither on the device nor (up to
    rounding) on the other images of its batch.

    Args:
        pipe: any text-to-image pipeline.
        settings: how it draws.
        image_to_image: also make the image-to-image pipeline of the same family, with the same networks.

    Raises:
        UserError: diffusers does not have an image-to-image pipeline for this family.
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
            strength: share of the steps that are done again; 1: the image is replaced completely.
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
        except ValueError as error:  # a size or a number of steps that this family does not accept
            raise UserError(f"{type(pipe).__name__} refuses the settings: {str(error).splitlines()[0]}") from error
        return [_image(one) for one in pixels]


def _image(pixels: np.ndarray) -> Image | None:
    """(H, W, 3) in [0, 1] as an image; None if a number is not finite, because it would become black and look safe."""
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
            f"{type(pipe).__name__}: diffusers does not have an image-to-image pipeline for this family "
            f"({str(error).splitlines()[0]}); use --counterpart same_seed"
        ) from error
    second.set_progress_bar_config(disable=True)
    return second


#: Stock inpainting pipelines take denoisers of so many input channels alone, apart from those made for inpainting.
_PAINTED_CHANNELS = {
    "StableDiffusionInpaintPipeline": ("unet", 4),
    "StableDiffusionXLInpaintPipeline": ("unet", 4),
    "StableDiffusion3InpaintPipeline": ("transformer", 16),
}


def inpainting(pipe: Any, instead: str) -> Any:
    """The stock inpainting pipeline of the same family, with the same networks.

    Args:
        pipe: a text-to-image pipeline.
        instead: what to do without one, for the message.

    Raises:
        UserError: diffusers does not have one for this family, or it does not take this model.
    """
    import diffusers

    kind = type(pipe).__name__
    found: Any
    try:
        if kind == "Flux2KleinPipeline":  # the auto class does not know it
            found = diffusers.Flux2KleinInpaintPipeline(**pipe.components, is_distilled=pipe.config.is_distilled)
        else:
            found = diffusers.AutoPipelineForInpainting.from_pipe(pipe)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{kind}: diffusers does not have an inpainting pipeline for this family: {instead}") from error
    name, taken = _PAINTED_CHANNELS.get(type(found).__name__, (None, 0))
    if name is not None and (own := getattr(found, name).config.in_channels) != taken:
        raise UserError(
            f"{type(found).__name__} paints latents of {taken} channels, and this model has {own}: {instead}"
        )
    found.set_progress_bar_config(disable=True)
    return found
