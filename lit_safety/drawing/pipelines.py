"""Loading any diffusers text-to-image pipeline for drawing, with an arm's adapter in it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lit_safety.core.errors import UserError
from lit_safety.core.progress import quiet_libraries

if TYPE_CHECKING:
    from lit_safety.drawing.arms import Arm


Precision = Literal["float32", "float16", "bfloat16"]


def local_pipeline(source: str, key: str = "--pipeline") -> Path:
    """The folder of a pipeline; one from the hub is downloaded first.

    Args:
        source: a folder or a hub id.
        key: the option or YAML key that it was given by, for messages.

    Raises:
        UserError: it is not a pipeline, or the hub does not give it; says how to log in.
    """
    quiet_libraries()
    from lit_safety.backbones.parts import Parts

    return Parts(source, key=key).fetch()


def arm_pipeline(name: str, arm: Arm, base: str) -> Path:
    """The folder of the pipeline that an arm draws with: its own, or that of the base.

    Raises:
        UserError: as `local_pipeline`.
    """
    if arm.pipeline is None:
        return local_pipeline(base)
    return local_pipeline(arm.pipeline, f"the `pipeline` of the arm {name}")


def load_pipeline(folder: Path, arm: Arm, device: str = "cpu", precision: Precision = "float32") -> Any:
    """A quiet pipeline that draws with DDIM where it can, on `device`.

    The arm's UNet and adapter are in it. A safety checker inside the pipeline is taken out: it blanks images, and a
    blank counts as safe.

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
    # SANA's is compatible by class alone: DDIM has no flow matching.
    process = getattr(pipe.scheduler, "config", {}).get("prediction_type", "epsilon")
    if DDIMScheduler in getattr(pipe.scheduler, "compatibles", []) and process != "flow_prediction":
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    try:
        pipe.to(device)
    except (RuntimeError, AssertionError) as error:  # what torch raises for a device that is not there, or too small
        raise UserError(f"--device {device}: the pipeline cannot be put there: {_first_line(error)}") from error
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

        fuse_loras(pipe)  # exact enough to fold in, and as fast as no adapter at all
    for name in ("unet", "vae"):
        network = getattr(pipe, name, None)
        if network is not None and all(weight.ndim <= 4 for weight in network.parameters()):  # not of one for video
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
    """Complain before anything heavy happens when a report cannot be written to `out`.

    Raises:
        UserError: `out` is a file, or the nearest folder that exists cannot be written to.
    """
    nearest = next(folder for folder in (out, *out.resolve().parents) if folder.exists())
    if not nearest.is_dir():
        raise UserError(f"--out {out}: {nearest} is a file; give a folder")
    if not os.access(nearest, os.W_OK):
        raise UserError(f"--out {out}: no permission to write in {nearest}; give another folder")
