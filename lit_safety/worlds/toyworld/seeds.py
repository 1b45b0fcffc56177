"""The seed ranges and their owners. The ranges never overlap; manifests and configs name the seeds that were used."""

import numpy as np

SEEDS: dict[str, range] = {
    "base": range(10_000_000),  # scenes that the pipeline (VAE, text encoder, UNet) learns from
    "judge_a": range(10_000_000, 20_000_000),
    "judge_b": range(20_000_000, 30_000_000),
    "clip": range(30_000_000, 40_000_000),
    "cost_model": range(40_000_000, 50_000_000),
    "pairs_train": range(50_000_000, 60_000_000),
    "pairs_val": range(60_000_000, 70_000_000),
    "pairs_test": range(70_000_000, 80_000_000),
    "prompts_val": range(80_000_000, 85_000_000),
    "prompts_test": range(85_000_000, 90_000_000),
    "checks": range(90_000_000, 100_000_000),  # scenes that only measure: accuracy of judges and CLIP, VAE error
    "pairs_onpolicy": range(100_000_000, 110_000_000),  # prompts, and the initial noise of their images
    "users": range(110_000_000, 120_000_000),  # profiles of users, and which pairs belong to which user
    "prompts_anchors": range(120_000_000, 125_000_000),  # harmless prompts that hold a policy to its reference
    "prompts_online": range(125_000_000, 130_000_000),  # prompts that a policy draws to learn from
}


def stream(owner: str, index: int) -> np.random.Generator:
    """The random stream of the owner's scene number `index`; ValueError if it is outside the owner's range."""
    allowed = SEEDS[owner]
    if not 0 <= index < len(allowed):
        raise ValueError(f"{owner} has {len(allowed)} seeds, there is no number {index}")
    return np.random.default_rng(allowed[index])
