"""Fold an adapter into a pipeline's weights and write the whole pipeline, all by stock diffusers."""

from __future__ import annotations

from pathlib import Path

from lit_safety.adapters.load_lora import fuse_loras, load_lora
from lit_safety.backbones.parts import weights_variant
from lit_safety.backbones.pipeline_index import pipeline_index
from lit_safety.errors import UserError
from lit_safety.evaluation.pipelines import local_pipeline


def fuse_pipeline(pipeline: str, adapter: Path, out: Path) -> None:
    """Write ``pipeline`` with ``adapter`` in its weights to ``out``, in fp32: half precision could round a small
    update away. A safety checker that the pipeline has stays in it.

    Raises:
        UserError: the pipeline does not load, or the adapter was made for another backbone.
    """
    import torch
    from diffusers import DiffusionPipeline

    folder = local_pipeline(pipeline)
    try:
        without = dict.fromkeys(pipeline_index(str(folder)).absent_text)
        pipe = DiffusionPipeline.from_pretrained(
            folder, dtype=torch.float32, variant=weights_variant(folder), local_files_only=True, **without
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, AttributeError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"the pipeline {pipeline} does not load: {first_line}") from error
    load_lora(pipe, adapter)
    fuse_loras(pipe, safe_fusing=True)
    pipe.unload_lora_weights()
    pipe.save_pretrained(out)
