"""Pairs that every method can be trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lit_safety.data.format.writer import ShardWriter
from lit_safety.users.table import write_users


@pytest.fixture(scope="session")
def user_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 pairs of two categories and four users, with the users next to them."""
    folder = tmp_path_factory.mktemp("shards") / "train"
    random = np.random.default_rng(0)
    with ShardWriter(folder, samples_per_shard=8) as writer:
        for i in range(16):
            images = [Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(2)]
            metadata = {
                "prompt": "a gun and a house", "prompt_kind": "harmful",
                "categories": [("hate", "violence")[i // 2 % 2]],
                "harmful": {"chosen": False, "rejected": True}, "order": "safety", "user_id": f"u{i % 4}",
                "cost": {"chosen": -1.0, "rejected": 1.0},
            }  # fmt: skip
            writer.write(f"{i:05d}", metadata, *images)
    write_users(folder, {f"u{i}": torch.randn(6, generator=torch.Generator().manual_seed(i)) for i in range(4)})
    return folder
