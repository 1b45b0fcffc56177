"""`policy: full` through the command line: a pipeline that stock diffusers loads, and a run that goes on exactly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from lit_safety.__main__ import main

Arguments = Callable[..., list[str]]
FULL = ("--model.init_args.policy", "full", "--model.init_args.lr_scheduler.init_args.max_lr", "1e-4")


def unet(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")


def test_it_leaves_a_pipeline_and_resumes_to_the_bit(command_line: Arguments, tiny_pipeline: Path, tmp_path: Path):
    assert main(command_line("fit", *FULL, "--run.name", "whole")) == 0
    whole = tmp_path / "runs" / "whole" / "latest"
    drawn = StableDiffusionPipeline.from_pretrained(whole / "pipeline")
    assert "DiffusionPipeline.from_pretrained" in (whole / "pipeline" / "README.md").read_text()
    trained, base = unet(whole), load_file(tiny_pipeline / "unet" / "diffusion_pytorch_model.safetensors")
    assert drawn.unet.config.sample_size == 8
    assert trained.keys() == base.keys()
    assert any(not torch.equal(trained[name], base[name]) for name in base)

    half = ("--trainer.max_steps", "2", "--trainer.val_check_interval", "2", "--run.name", "half")
    half = (*half, "--model.init_args.lr_scheduler.init_args.total_steps", "4")
    assert main(command_line("fit", *FULL, *half)) == 0
    assert main(command_line("fit", *FULL, "--run.name", "half", "--ckpt_path", "last")) == 0
    resumed = unet(tmp_path / "runs" / "half" / "latest")
    assert all(torch.equal(trained[name], resumed[name]) for name in trained)
