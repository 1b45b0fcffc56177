"""A `fit` of a few steps on a tiny pipeline and drawn pairs, through the real command line."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.small_fits import small_fit


@pytest.fixture
def command_line(tiny_pipeline: Path, pair_shards: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Arguments of a trainer command on tiny data, writing under ``tmp_path``; further ones are appended."""

    def arguments(command: str, *more: str) -> list[str]:
        settings = {
            "model.init_args.pretrained": tiny_pipeline,
            "model.init_args.lora.init_args.rank": 4,
            "model.init_args.drawing.steps": 2,
        }
        return small_fit(command, ["scdpo.yaml"], tmp_path / "runs", pair_shards, settings, more)

    return arguments


@pytest.fixture(autouse=True)
def no_handlers_on_closed_streams() -> None:
    """Lightning's own log handlers keep the stderr of their first use, which pytest has replaced since."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).handlers.clear()
