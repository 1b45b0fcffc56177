"""A profile as numbers without any model: its multi-hot, through one fixed random projection.

The default where no text model is at hand. As in a text model's embedding, traits and bans lie in directions that mean
nothing by themselves: an adapter has to learn them.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from lit_safety.core.categories import CATEGORIES
from lit_safety.core.errors import UserError
from lit_safety.users.profiles import Profile
from lit_safety.users.rules import VALUES, check_traits

SEED = 20250801
#: What a user bans is what the adapter must respect, and eight numbers among 33: they weigh more than a trait.
BAN_WEIGHT = 3.0
#: One number for each value of each trait and for each category that is banned.
SIZE = sum(len(values) for values in VALUES.values()) + len(CATEGORIES)


def multi_hot(profile: Profile) -> Tensor:
    """1 where the profile's traits stand and `BAN_WEIGHT` where its banned categories do, (SIZE,), float32.

    Raises:
        UserError: a trait is none of the known values; names the user.
    """
    traits = {field: getattr(profile, field) for field in VALUES}
    try:
        check_traits(traits)
    except UserError as error:
        raise UserError(f"user {profile.user_id!r}: {error}; a text model (--model) reads any profile") from error
    hot = [float(traits[field] == value) for field, values in VALUES.items() for value in values]
    return torch.tensor(hot + [BAN_WEIGHT * (name in profile.banned) for name in CATEGORIES])


def project(profiles: Iterable[Profile], dimension: int = 64, seed: int = SEED) -> dict[str, Tensor]:
    """Embeddings (dimension,) by user id: the multi-hot times a fixed Gaussian matrix, the same in every release."""
    if dimension < 1:
        raise UserError(f"dimension must be at least 1, not {dimension}")
    # RandomState's streams are frozen by numpy's compatibility policy; Generator's and torch's are not.
    matrix = np.random.RandomState(seed).standard_normal((SIZE, dimension)) / np.sqrt(SIZE)
    projection = torch.from_numpy(matrix).float()
    return {profile.user_id: multi_hot(profile) @ projection for profile in profiles}
