"""Gradients are clipped by the norm of all ranks' and all micro-batches' gradient together, whatever the strategy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.methods import exported, under, write_config
from tests.helpers.ranks import run


@pytest.mark.slow
def test_clipping_is_the_same_under_every_strategy(tiny_pipeline: Path, user_shards: Path, tmp_path: Path):
    """A limit far below the norm, and SGD: what a gradient that is divided once too often would not show to Adam."""
    moved = {}
    for strategy in ("alone", "ddp", "fsdp", "deepspeed_zero2", "deepspeed_zero3"):
        folder = tmp_path / strategy
        folder.mkdir()
        ranks = 1 if strategy == "alone" else 2
        config = write_config(folder, "scdpo", tiny_pipeline, user_shards, gradient_clip_val=1e-3)
        command = ["fit", "--config", str(config), "--data.init_args.batch_size", str(4 // ranks**2)]
        command += ["--model.init_args.optimizer.init_args.lr", "10", "--trainer.accumulate_grad_batches", str(ranks)]
        command += ["--trainer.val_check_interval", str(4 * ranks)]
        command += [] if ranks == 1 else [*under(strategy), "--trainer.devices", "2"]
        run(command, folder / "logs", ranks=ranks)
        trained = exported(folder / "runs" / "fit" / "latest")
        moved[strategy] = torch.cat([trained[name].flatten() for name in sorted(trained) if "lora_B" in name])
    true = moved.pop("alone")
    assert true.norm() > 0
    for strategy, found in moved.items():
        assert (found - true).norm() < 0.02 * true.norm(), strategy
