"""A `fit` of a few steps on a tiny pipeline and drawn pairs, through the real command line."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

CONFIG = Path(__file__).parents[2] / "configs" / "scdpo.yaml"


@pytest.fixture
def command_line(tiny_pipeline: Path, pair_shards: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Arguments of a trainer command on tiny data, writing under ``tmp_path``; further ones are appended."""

    def arguments(command: str, *more: str) -> list[str]:
        shards = {f"--data.init_args.{stage}": str(pair_shards) for stage in ("train", "val", "test")}
        settings = {
            "--config": str(CONFIG),
            "--run.root": str(tmp_path / "runs"),
            "--model.init_args.pretrained": str(tiny_pipeline),
            "--model.init_args.lora.init_args.rank": "4",
            "--model.init_args.drawing.steps": "2",
            **shards,
            "--data.init_args.batch_size": "4",
            "--data.init_args.num_workers": "0",
            "--trainer.max_steps": "4",
            "--trainer.val_check_interval": "4",
            "--trainer.accelerator": "cpu",
        }
        return [command, *(word for pair in settings.items() for word in pair), *more]

    return arguments


@pytest.fixture(autouse=True)
def no_handlers_on_closed_streams() -> None:
    """Lightning's own log handlers keep the stderr of their first use, which pytest has replaced since."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).handlers.clear()
