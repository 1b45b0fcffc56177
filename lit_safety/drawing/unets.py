"""A UNet that was published alone and replaces a pipeline's own: a `unet/` folder, or weights in one file.

SafetyDPO, Diffusion-DPO and others publish the folder; ESD and UCE publish a file of all weights or of the changed
ones.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_safety.core.errors import UserError
from lit_safety.core.hashes import content_sha256
from lit_safety.core.weights import (
    DIFFUSERS,
    how_to_convert,
    is_pickled,
    open_safetensors,
    read_header,
    weights_of,
)

if TYPE_CHECKING:
    from torch import Tensor

    from lit_safety.backbones.parts import Parts


CONFIG = "config.json"
LDM = "model.diffusion_model."
"""The prefix of a UNet's weights in Stable Diffusion's own code, also in a file of the whole model."""
_WRAPPERS = ("module.", "_orig_mod.", "unet.")
_LDM_LAYER = re.compile(r"(?:input_blocks|middle_block|output_blocks|time_embed|label_emb|out)\.\d")
_SAME = ("in_channels", "out_channels", "cross_attention_dim", "addition_embed_type", "encoder_hid_dim")
"""The parts of a UNet's configuration that must fit the rest of the pipeline."""


def find_unet(path: str | Path) -> Path:
    """The folder that holds a UNet's config.json, or the file of its weights.

    Raises:
        UserError: there is none, or the file could run code when it is loaded; says how to convert it.
    """
    path = Path(path)
    if path.is_dir():
        found = next((one for one in (path, path / "unet") if (one / CONFIG).is_file()), None)
        if found is None:
            raise UserError(
                f"{path}: is not a UNet's folder: it lacks {CONFIG} and unet/{CONFIG}; give the folder of a UNet"
            )
        return found
    if not path.is_file():
        raise UserError(
            f"{path}: no such file or folder; download a UNet of the hub first, `hf download NAME --local-dir FOLDER`"
        )
    if is_pickled(path):
        raise UserError(
            f"{path}: is not read, because files of this kind can run code when they are loaded; "
            f"{how_to_convert(path)}, and name the new file"
        )
    return path


def describe_unet(path: str | Path, pipeline: Path | None) -> dict[str, Any]:
    """Its entry in a report: its path, its hash, and how many tensors of the pipeline it replaces.

    Args:
        path: the folder or file.
        pipeline: the pipeline's folder; None: it is not known.

    Raises:
        UserError: as `find_unet`, or a file is damaged.
    """
    found = find_unet(path)
    tensors = {"replaced": _count(found)} | ({} if pipeline is None else {"of": _count(pipeline / "unet")})
    return {"unet": str(path), "unet_sha256": content_sha256(found), "unet_tensors": tensors}


def _count(place: Path) -> int:
    if place.is_file():
        return len(read_header(place)[0])
    weights = weights_of(place, DIFFUSERS)
    return 0 if weights is None else sum(len(read_header(place / name)[0]) for name in weights.names)


def put_unet(parts: Parts, path: str | Path, partial: bool = False) -> None:
    """Replace a pipeline's UNet.

    Args:
        parts: the pipeline's components; its UNet must not be in use yet.
        path: the folder or file.
        partial: the file may hold only a part of the weights; the others stay the pipeline's.

    Raises:
        UserError: it is damaged, belongs to another kind of model, or lacks weights; names the file.
    """
    if not parts.has("unet"):
        raise UserError(
            f"{path}: is a UNet, but the pipeline {parts.source} ({parts.index.class_name}) does not have one"
        )
    found = find_unet(path)
    if found.is_dir():
        parts.put("unet", _from_folder(parts, found))
    else:
        _fill(
            parts.get("unet"), _tensors(found, parts.get("unet"), parts.index.class_name), found, parts.source, partial
        )


def _from_folder(parts: Parts, folder: Path) -> Any:
    from lit_safety.backbones.parts import load_network

    kind: Any = parts.class_of("unet")
    try:
        network = load_network(kind, folder, parts.dtype)
    except (OSError, ValueError, LookupError, RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}: does not load as a UNet: {_first_line(error)}") from error
    base, defaults = parts.config("unet"), inspect.signature(kind.__init__).parameters
    for key in _SAME:
        own, other = network.config[key], base.get(key, defaults[key].default)
        if own != other:
            raise UserError(
                f"{folder}: was made for another model than {parts.source}: its {key} is {own}, that of the pipeline's "
                f"UNet {other}"
            )
    return network


def _tensors(file: Path, unet: Any, pipeline: str) -> dict[str, Tensor]:
    """The file's weights by diffusers' names; `pipeline` is the class of the pipeline, for messages."""
    with open_safetensors(file) as handle:
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    if not tensors:
        raise UserError(f"{file}: holds 0 tensors")
    names = list(tensors)
    if any(name.startswith(LDM) for name in names):
        others = [name for name in names if not name.startswith(LDM)]
        if others:
            line = f"import diffusers; diffusers.{pipeline}.from_single_file({str(file)!r}).save_pretrained('FOLDER')"
            raise UserError(
                f"{file}: is a whole model, with {others[0]} and {len(others) - 1} more tensors besides its UNet; "
                f'convert it once, `python -c "{line}"`, and name FOLDER as the arm\'s pipeline'
            )
        return _from_ldm(tensors, file, unet)
    for wrapper in (*_WRAPPERS, "diffusion_model."):
        if all(name.startswith(wrapper) for name in tensors):
            tensors = {name.removeprefix(wrapper): tensor for name, tensor in tensors.items()}
    if all(_LDM_LAYER.match(name) for name in tensors):
        return _from_ldm({f"{LDM}{name}": tensor for name, tensor in tensors.items()}, file, unet)
    return tensors


def _from_ldm(tensors: dict[str, Tensor], file: Path, unet: Any) -> dict[str, Tensor]:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    try:
        converted: dict[str, Tensor] = convert_ldm_unet_checkpoint(dict(tensors), dict(unet.config))
    except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file}: diffusers cannot convert its names, which come from Stable Diffusion's own code "
            f"({_first_line(error)}); publish it in diffusers' names, `pipe.unet.save_pretrained(FOLDER)`"
        ) from error
    if len(converted) != len(tensors):  # diffusers ignores unknown tensors
        raise UserError(
            f"{file}: diffusers converts {len(converted)} of its {len(tensors)} tensors: it belongs to another model "
            "than the pipeline, or is incomplete"
        )
    return converted


def _fill(unet: Any, tensors: dict[str, Tensor], file: Path, source: str, partial: bool) -> None:
    import torch

    own = unet.state_dict()
    if strange := sorted(set(tensors) - set(own)):
        lora = any("lora" in name.lower() for name in strange)
        why = "it is a LoRA: name it as the arm's `adapter`" if lora else "it belongs to another model"
        raise UserError(f"{file}: {strange[0]}{_more(len(strange))} does not exist in the UNet of {source}: {why}")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise UserError(
                f"{file}: was made for another model than {source}: {name} has shape {tuple(tensor.shape)}, and there "
                f"{tuple(own[name].shape)}"
            )
        if not tensor.is_floating_point() or not torch.isfinite(tensor.float()).all():
            raise UserError(f"{file}: {name} holds numbers that are not finite or not floating-point")
    missing = [name for name in own if name not in tensors]
    if missing and not partial:
        raise UserError(
            f"{file}: holds {len(tensors)} of the UNet's {len(own)} tensors, and lacks {missing[0]}; if the others are "
            "the pipeline's (ESD and UCE publish only changed weights), set `unet_partial: true` in the arm"
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def _more(count: int) -> str:
    return f" (and {count - 1} more)" if count > 1 else ""


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
