from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lit_safety.core.errors import UserError
from lit_safety.users.embeddings import SIZE, multi_hot, project
from lit_safety.users.profiles import Profile, read_profiles

PROFILE = Profile("anna", 18, "adolescents", "male", "None", "healthy", "war", ("violence", "propaganda"), ("hate",))


def test_traits_are_ones_and_bans_weigh_more() -> None:
    """8 age groups + 2 genders + 4 religions + 4 physical + 7 mental conditions + 8 categories = 33 numbers.

    Adolescents are the third group: 2. Male: 8 + 1 = 9. "None": 10. Healthy: 14. War, the seventh: 18 + 6 = 24.
    Violence is the third category: 25 + 2 = 27; propaganda the eighth: 32.
    """
    found = multi_hot(PROFILE)
    assert SIZE == len(found) == 33
    assert found.nonzero().flatten().tolist() == [2, 9, 10, 14, 24, 27, 32]
    assert found[found > 0].tolist() == [1.0] * 5 + [3.0] * 2


def test_the_projection_is_fixed_and_keeps_profiles_apart() -> None:
    users = read_profiles(Path(__file__).parent / "sage_profiles.csv").values()
    found = torch.stack(list(project(users).values()))
    assert found.shape == (412, 64)
    torch.testing.assert_close(found, torch.stack(list(project(users).values())))
    hot = torch.stack([multi_hot(one) for one in users])
    # 64 random directions of 33 numbers: the multi-hot can be told from the embedding again.
    solved = torch.linalg.lstsq(found, hot).solution
    torch.testing.assert_close(found @ solved, hot, atol=1e-3, rtol=0)
    assert not torch.equal(found, torch.stack(list(project(users, seed=1).values())))


def test_an_unknown_trait_names_the_user() -> None:
    with pytest.raises(UserError, match=r"user 'anna': religion is 'Jedi'; known are None.*text model"):
        multi_hot(replace(PROFILE, religion="Jedi"))
    with pytest.raises(UserError, match="dimension"):
        project([PROFILE], 0)
