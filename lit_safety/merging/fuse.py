"""Fold an adapter into a pipeline's weights and write the whole pipeline, all by stock diffusers."""

from __future__ import annotations

from pathlib import Path

from lit_safety.adapters.load_lora import fuse_loras, load_lora
from lit_safety.backbones.parts import Parts
from lit_safety.evaluation.pipelines import local_pipeline


def fuse_pipeline(pipeline: str, adapter: Path, out: Path) -> None:
    """Write ``pipeline`` with ``adapter`` in its weights to ``out``, in fp32: half precision could round a small
    update away. A safety checker that the pipeline has stays in it.

    Raises:
        UserError: the pipeline does not load, or the adapter was made for another backbone.
    """
    pipe = Parts(str(local_pipeline(pipeline))).pipeline(safety_checker=True)
    load_lora(pipe, adapter)
    fuse_loras(pipe, safe_fusing=True)
    pipe.unload_lora_weights()
    pipe.save_pretrained(out)
