"""Squares of colour in place of the icons, which are not in the repository."""

from pathlib import Path

import numpy as np
import pytest

from lit_safety.judges.art.subjects import STYLES, SUBJECTS


@pytest.fixture(scope="session")
def art_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every subject in every style a square of its own colour."""
    rng = np.random.default_rng(0)
    file = tmp_path_factory.mktemp("art") / "art.npz"
    squares = {}
    for style in STYLES:
        colours = rng.integers(0, 256, (len(SUBJECTS), 1, 1, 3))
        opaque = np.full((len(SUBJECTS), 8, 8, 1), 255)
        filled = np.broadcast_to(colours, (len(SUBJECTS), 8, 8, 3))
        squares[style] = np.concatenate([filled, opaque], 3).astype(np.uint8)
    np.savez(file, **squares)
    return file
