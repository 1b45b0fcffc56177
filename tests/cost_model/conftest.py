"""Labelled pairs that any CLIP can tell apart: harmful images are red, safe ones blue."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lit_safety.data.format.writer import ShardWriter
from tests.helpers.small_fits import small_fit


def make_image(random: np.random.Generator, harmful: bool, side: int = 32) -> Image.Image:
    noise = random.integers(0, 120, (side, side, 3), dtype=np.uint8)
    noise[..., 0 if harmful else 2] += 120
    return Image.fromarray(noise)


def write_labelled(folder: Path, count: int, seed: int, cost: bool = False) -> Path:
    random = np.random.default_rng(seed)
    with ShardWriter(folder, samples_per_shard=8, provenance={"source": "drawn"}) as writer:
        for i in range(count):
            metadata = {
                "prompt": "a gun" if i % 2 else "a red cat",
                "prompt_kind": "harmful" if i % 2 else "clean",
                "categories": ["violence"] if i % 2 else ["hate"],
                "harmful": {"chosen": False, "rejected": True},
                "order": "safety",
            }
            if cost:
                metadata["cost"] = {"chosen": -1.0, "rejected": 1.0}
            writer.write(f"{i:05d}", metadata, make_image(random, False), make_image(random, True))
    return folder


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `train` (24 pairs), `val` (16 pairs) and `costed` (8 pairs that have costs)."""
    folder = tmp_path_factory.mktemp("labelled")
    write_labelled(folder / "train", 24, 0)
    write_labelled(folder / "val", 16, 1)
    write_labelled(folder / "costed", 8, 2, cost=True)
    return folder


@pytest.fixture
def cost_model_command(tiny_clip: Path, labelled: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Arguments of a trainer command with the shipped YAML on tiny data, writing under ``tmp_path``."""

    def arguments(command: str, *more: str) -> list[str]:
        settings = {
            "model.init_args.clip": tiny_clip,
            "model.init_args.width": 16,
            "model.init_args.degradation.views": 2,
            "model.init_args.feature_cache": tmp_path / "features",
            "data.init_args.batch_size": 8,
            "trainer.max_steps": 12,
            "trainer.val_check_interval": 6,
        }
        shards = {"train": labelled / "train", "val": labelled / "val", "test": labelled / "val"}
        return small_fit(command, ["cost_model.yaml"], tmp_path / "runs", shards, settings, more)

    return arguments
