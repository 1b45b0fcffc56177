"""Fixtures of the data tests. The helpers beside this file (`pair_*.py`) are plain modules."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode leaves the helpers' folder out

from pair_shards import write_shards

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 pairs in 6 shards of 7 (the last holds 5)."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, 40, 7)
    return folder
