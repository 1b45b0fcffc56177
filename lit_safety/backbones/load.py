"""Chooses the backbone by the pipeline's `model_index.json`."""

from __future__ import annotations

from importlib import import_module

from lit_safety.backbones.backbone import Backbone
from lit_safety.backbones.pipeline_index import KEY, pipeline_class_name
from lit_safety.backbones.settings import BackboneSettings
from lit_safety.core.errors import UserError

#: diffusers' pipeline class name -> the file here and the family's class in it; imported when it is needed.
FAMILIES: dict[str, tuple[str, str]] = {
    "StableDiffusionPipeline": ("stable_diffusion", "StableDiffusion"),
    "StableDiffusionXLPipeline": ("stable_diffusion_xl", "StableDiffusionXL"),
    "StableDiffusion3Pipeline": ("stable_diffusion_3", "StableDiffusion3"),
    "FluxPipeline": ("flux", "Flux"),
    "Flux2KleinPipeline": ("flux_2", "Flux2Klein"),
    "Flux2Pipeline": ("flux_2", "Flux2"),
    "QwenImagePipeline": ("qwen_image", "QwenImage"),
    "ZImagePipeline": ("z_image", "ZImage"),
    "SanaPipeline": ("sana", "Sana"),
}
#: Pipelines that are not trained, and why.
REFUSED = {
    "SanaSprintPipeline": "was distilled to draw in a few steps, which training would undo: train its base, "
    "Efficient-Large-Model/Sana_1600M_1024px_diffusers",
    "ChromaPipeline": "diffusers adds its text mask to the logits as 0 and 1, and leaves it out under gradient "
    "checkpointing, so gradients would be those of another model",
}


def family_of(source: str, key: str = KEY) -> type[Backbone]:
    """The backbone class for the pipeline at ``source``, given as the option or YAML key ``key``. No weight is read.

    Raises:
        UserError: there is no pipeline, or its family is unknown.
    """
    name = pipeline_class_name(source, key)
    if name in REFUSED:
        raise UserError(f"{source}: pipelines of class {name} are not supported: {REFUSED[name]}")
    if name not in FAMILIES:
        raise UserError(f"{source}: pipelines of class {name} are not supported; supported: {', '.join(FAMILIES)}")
    file, kind = FAMILIES[name]
    family: type[Backbone] = getattr(import_module(f"lit_safety.backbones.{file}"), kind)
    return family


def load_backbone(
    source: str, denoiser: bool = True, key: str = KEY, settings: BackboneSettings | None = None
) -> Backbone:
    """The pipeline at ``source`` (a folder or a hub id) as its family's backbone, frozen, in fp32 unless set otherwise.

    Args:
        source: the pipeline.
        denoiser: False leaves the denoiser out, for work that needs only the encoders.
        key: its option or YAML key, for messages.
        settings: settings of the family's class; None: its defaults.

    Raises:
        UserError: there is no pipeline, its family is unknown, its files do not load, or the settings are of another
            class.
    """
    family = family_of(source, key)
    try:
        backbone = family.from_pretrained(source, denoiser, key, settings)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        lines = str(error).strip().splitlines()
        raise UserError(
            f"the pipeline {source} does not load: {lines[0] if lines else type(error).__name__}"
        ) from error
    # A run from a cache needs no tokenizer. An incomplete one would be read as a tokenizer of two words.
    tokenizers = [name for name, _ in family.TOKENIZERS if (backbone.parts.index.folder / name).is_dir()]
    backbone.parts.check_files(name for name in tokenizers if backbone.parts.has(name))
    return backbone.requires_grad_(False).eval()
