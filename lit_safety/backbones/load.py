"""Choose the backbone by the pipeline's own `model_index.json`."""

from __future__ import annotations

import json
from pathlib import Path

from lit_safety.backbones.backbone import Backbone
from lit_safety.backbones.stable_diffusion import StableDiffusion
from lit_safety.errors import UserError

#: diffusers' pipeline class name -> the class that knows the family.
FAMILIES: dict[str, type[Backbone]] = {"StableDiffusionPipeline": StableDiffusion}


def pipeline_class_name(source: str) -> str:
    """The pipeline's class name out of `model_index.json` of a folder or a hub id.

    Raises:
        UserError: if ``source`` is neither a pipeline folder nor a reachable hub id.
    """
    folder = Path(source)
    if folder.is_dir():
        index = folder / "model_index.json"
        if not index.is_file():
            raise UserError(f"{folder} is no diffusers pipeline: it has no model_index.json; give the folder that "
                            "`save_pretrained` wrote, or a hub id")  # fmt: skip
    else:
        index = _index_from_hub(source)
    try:
        name = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index} is no diffusers model index ({error}); is the download complete?") from error
    return str(name)


def _index_from_hub(source: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(source, "model_index.json"))
    except HFValidationError as error:
        raise UserError(f"no folder {source!r}, and it is no hub id either: check `model.pretrained`") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"no folder {source!r}, and the hub did not give it ({type(error).__name__}): check the path; for a gated "
            "model accept its licence and run `hf auth login`; offline, point at a local folder"
        ) from error


def load_backbone(source: str) -> Backbone:
    """Load the pipeline at ``source`` (a folder or a hub id) as its family's backbone, frozen, in fp32.

    Raises:
        UserError: if there is no pipeline, its family is unknown, or its files do not load.
    """
    name = pipeline_class_name(source)
    family = FAMILIES.get(name)
    if family is None:
        raise UserError(f"{source}: pipelines of class {name} are not supported; supported: {', '.join(FAMILIES)}")
    try:
        backbone = family.from_pretrained(source)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"the pipeline {source} does not load: {first_line}") from error
    return backbone.requires_grad_(False).eval()
