"""A judge that does not see what the prompts ask for gives no labels."""

from __future__ import annotations

import pytest

from lit_safety.core.errors import UserError
from lit_safety.generation.pairs import Assessor


def test_a_judge_that_cannot_see_a_category_labels_nothing() -> None:
    assessor = Assessor("data/toyworld/judge", None)
    assessor.check(["violence", "hate"], "pairs.csv")
    assessor.judge.settings["categories"] = ["sexual"]
    assessor.check(["sexual"], "pairs.csv")
    with pytest.raises(UserError, match=r"pairs\.csv.*violence"):
        assessor.check(["sexual", "violence"], "pairs.csv")
