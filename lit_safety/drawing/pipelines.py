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


Precision = Literal["float32", "tf32", "float16", "bfloat16"]


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
    pipe = _plain(folder, arm, device, precision)
    _adapt(pipe, arm, precision)
    _check(pipe, arm)
    return pipe


def _plain(folder: Path, arm: Arm, device: str, precision: Precision) -> Any:
    """The arm's pipeline without its adapters."""
    quiet_libraries()
    from diffusers import DDIMScheduler

    from lit_safety.backbones.parts import Parts
    from lit_safety.core.hardware import check_precision, weights_of

    check_precision(precision, device, "--precision")
    parts = Parts(str(folder), weights_of(precision))
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
    return pipe


def _adapt(pipe: Any, arm: Arm, precision: Precision) -> list[tuple[Any, Any]]:
    """Put an arm's adapters into its pipeline; returns the weights that fusing changed, each with a copy of before."""
    import torch

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
    before: list[tuple[Any, Any]] = []
    if precision in ("float32", "tf32") and (loras or for_users is not None):
        from lit_safety.adapters.load_lora import adapted_weights, fuse_loras

        before = [(weight, weight.detach().clone()) for weight in adapted_weights(pipe)] if for_users is None else []
        fuse_loras(pipe)  # exact enough, and as fast as without an adapter
    for name in ("unet", "vae"):
        network = getattr(pipe, name, None)
        if network is not None and all(weight.ndim <= 4 for weight in network.parameters()):  # not for video networks
            network.to(memory_format=torch.channels_last)
    return before


def _check(pipe: Any, arm: Arm) -> None:
    if arm.guard is not None:
        arm.guard.check(pipe)
    elif hasattr(pipe, "text_encoder_3") and pipe.text_encoder_3 is None:
        from lit_safety.backbones.stable_diffusion_3 import count_missing_t5

        count_missing_t5(pipe)


class Pipelines:
    """Loads the pipelines of arms, and keeps the last one for the next arm, which often differs in its LoRA alone.

    A LoRA is taken out again, and the weights that it changed are put back from copies, so that the next arm draws the
    same pixels as with a pipeline of its own. A user adapter is not taken out: the pipeline is loaded again.
    """

    def __init__(self) -> None:
        self._pipe: Any = None
        self._base: Any = None
        """What decides the pipeline without adapters."""
        self._worn: Any = None
        """The adapters that are in it."""
        self._before: list[tuple[Any, Any]] = []
        self.loaded = 0
        """How often a pipeline was read from its files."""

    def load(self, folder: Path, arm: Arm, device: str, precision: Precision) -> Any:
        """As `load_pipeline`. The pipeline may be used until the next call."""
        base = (folder, arm.unet, arm.unet_partial, device, precision)
        worn = (tuple(arm.loras().items()), arm.user_adapter(), arm.users if arm.user_adapter() is not None else None)
        if self._pipe is not None and (self._base != base or (self._worn != worn and not self._take_out())):
            self.release()
        if self._pipe is None:
            self._pipe, self._base = _plain(folder, arm, device, precision), base
            self._worn = None
            self.loaded += 1
        if self._worn != worn:
            pipe, self._pipe = self._pipe, None  # if an adapter does not load, the pipeline is not used again
            self._before = _adapt(pipe, arm, precision)
            self._pipe, self._worn = pipe, worn
        _check(self._pipe, arm)
        return self._pipe

    def release(self) -> None:
        """Forget what is loaded, so that its memory is free."""
        self._pipe = self._base = self._worn = None
        self._before = []

    def _take_out(self) -> bool:
        """Take the adapters out; False: that cannot be done exactly."""
        if self._worn is None:
            return True
        loras, for_users, _ = self._worn
        if for_users is not None:
            return False
        if loras:
            import torch

            with torch.no_grad():
                for weight, copied in self._before:
                    weight.copy_(copied)
            self._pipe.unload_lora_weights()
        self._before, self._worn = [], None
        return True


def free_memory(device: Any) -> int | None:
    """Bytes that new tensors can use on a GPU, those that torch holds and does not use included; None: no GPU."""
    import torch

    if device.type != "cuda":
        return None
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + idle


def decoding_bytes(images: int, pixels: int, channels: int, itemsize: int) -> int:
    """About how much memory decoding needs: eight maps of the decoder's first width at the images' size.

    The last block of Stable Diffusion's decoder holds maps of twice that width: its input, the normalised input, and
    the output of a convolution. It is an estimate from the layers' shapes; 4 KiB a pixel in float32 for a width of 128.

    Args:
        images: decoded at once.
        pixels: of one image.
        channels: the decoder's first width.
        itemsize: bytes of a number.
    """
    return 8 * channels * itemsize * images * pixels


def slice_decoding(pipe: Any, images: int, side: int | None) -> bool:
    """Let the image decoder take one image after the other where all at once may not fit; returns whether it does.

    On a GPU that is when decoding would take more than half of the free memory. Elsewhere nothing is changed.

    Args:
        pipe: the pipeline, on its device.
        images: drawn at once.
        side: of the images, in pixels; None: the pipeline's own.
    """
    vae: Any = getattr(pipe, "vae", None)
    weight = next(vae.parameters(), None) if vae is not None else None
    if weight is None or not hasattr(vae, "enable_slicing") or (free := free_memory(weight.device)) is None:
        return False
    side = side or getattr(pipe, "default_sample_size", 128) * getattr(pipe, "vae_scale_factor", 8)
    widths = getattr(vae.config, "block_out_channels", (128,))
    slices = images > 1 and 2 * decoding_bytes(images, side * side, widths[0], weight.element_size()) > free
    (vae.enable_slicing if slices else vae.disable_slicing)()
    return bool(slices)


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
        precision: Number format of the weights while drawing. tf32: float32 whose matrices a GPU multiplies in TF32.

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
        from lit_safety.core.hardware import products

        try:
            with products(self.settings.precision):
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
