"""The seed ranges of the art world and their owners. They overlap neither each other nor those of the toy world."""

import numpy as np

SEEDS: dict[str, range] = {
    "base": range(200_000_000, 210_000_000),  # scenes that the pipeline (VAE, text encoder, UNet) learns from
    "judge_a": range(210_000_000, 220_000_000),
    "judge_b": range(220_000_000, 230_000_000),
    "clip": range(230_000_000, 240_000_000),
    "cost_model": range(240_000_000, 250_000_000),
    "pairs_train": range(250_000_000, 260_000_000),
    "pairs_val": range(260_000_000, 270_000_000),
    "prompts_anchors": range(270_000_000, 275_000_000),
    "prompts_val": range(280_000_000, 285_000_000),
    "prompts_test": range(285_000_000, 290_000_000),
    "checks": range(290_000_000, 300_000_000),  # scenes that only measure
}


def stream(owner: str, index: int) -> np.random.Generator:
    """The random stream of the owner's scene number `index`; ValueError if it is outside the owner's range."""
    allowed = SEEDS[owner]
    if not 0 <= index < len(allowed):
        raise ValueError(f"{owner} has {len(allowed)} seeds, there is no number {index}")
    return np.random.default_rng(allowed[index])
