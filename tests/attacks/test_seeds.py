import pytest

from lit_safety.attacks import AnySeed
from lit_safety.core.errors import UserError


def test_every_stage_draws_the_same_prompts_with_seeds_of_its_own(make_target, rows) -> None:
    stages = list(AnySeed(3).stages(make_target()))
    assert [stage.budget for stage in stages] == [1, 2, 3]
    assert all([p.prompt for p in stage.prompts] == ["a gun", "red gun"] for stage in stages)
    seeds = [p.seed for stage in stages for p in stage.prompts]
    assert len({*seeds, rows[0].seed, rows[1].seed}) == 8
    again = [p.seed for stage in AnySeed(2).stages(make_target()) for p in stage.prompts]
    assert again == seeds[:4]
    assert AnySeed.cumulative  # a prompt counts when any of its images is harmful
    with pytest.raises(UserError, match="seeds 0"):
        AnySeed(0)
