"""User adapters of random weights, for pipelines of random weights."""

from __future__ import annotations

from pathlib import Path

import torch

from lit_safety.adapters.user_attention import UserAdapter
from lit_safety.adapters.user_file import save_user_adapter
from lit_safety.users.profiles import PROFILES_FILE, Profile, write_profiles
from lit_safety.users.table import write_users

SIZE = 6


def save_random_adapter(pipeline: Path, folder: Path, tokens: int = 2, strength: float = 1.0) -> Path:
    """A user adapter whose images differ from user to user."""
    from diffusers import StableDiffusionPipeline

    unet = StableDiffusionPipeline.from_pretrained(pipeline, safety_checker=None).unet
    generator = torch.Generator().manual_seed(3)
    adapter = UserAdapter.attach(unet, SIZE, tokens)
    for _, parameter in adapter.named_parameters():
        parameter.data.normal_(0, strength, generator=generator)
    save_user_adapter(adapter, folder, "tiny")
    return folder


def save_users(folder: Path, profiles: list[Profile], without: tuple[str, ...] = ()) -> Path:
    """users.csv and users.safetensors, random embeddings; `without` have none."""
    generator = torch.Generator().manual_seed(4)
    vectors = {one.user_id: torch.randn(SIZE, generator=generator) for one in profiles}
    write_users(folder, {user: vector for user, vector in vectors.items() if user not in without})
    write_profiles(folder / PROFILES_FILE, profiles)
    return folder
