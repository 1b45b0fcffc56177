from dataclasses import replace

import numpy as np
import pytest

from lit_safety.worlds.toyworld.sampling import flawed, quality
from lit_safety.worlds.toyworld.scene import SLOTS, Scene, Thing, render, to_array

CONTENTS = (("cat", "red"), ("car", "blue"))
CAT, CAR = Thing("cat", 0, SLOTS[0], 70, "red"), Thing("car", 1, SLOTS[1], 70, "blue")
GOOD = Scene("park", (CAT, CAR))


@pytest.mark.parametrize(
    ("scene", "expected"),
    [
        (GOOD, 1.0),
        (Scene("park", (replace(CAT, colour="blue"), CAR)), 0.75),  # (0.5 + 1) / 2
        (Scene("park", (CAR,)), 0.5),  # (0 + 1) / 2
        (Scene("park", (replace(CAT, visible=0.4), CAR)), 0.7),  # (0.4 + 1) / 2
        (replace(GOOD, blots=((30, 70, 10), (34, 60, 9))), 0.5),  # 1 - 2 x 0.25
        (replace(GOOD, blur=5.0), 0.4),  # 1 - 5 x 0.12
        (Scene("park", (), blots=((30, 70, 10),)), 0.0),  # never below 0
    ],
)
def test_quality_is_the_mean_worth_of_what_was_asked_less_damage(scene: Scene, expected: float) -> None:
    assert quality(CONTENTS, scene) == pytest.approx(expected)


def test_harm_plays_no_part_in_quality() -> None:
    gun = Thing("gun", 1, SLOTS[1], 70)
    contents = (("cat", "red"), ("gun", None))
    assert quality(contents, Scene("park", (CAT,), gun)) == quality(contents, Scene("park", (CAT,))) == 1.0


def test_every_flaw_lowers_quality_and_can_be_seen() -> None:
    scores = set()
    for seed in range(60):
        worse = flawed(np.random.default_rng(seed), GOOD)
        scores.add(quality(CONTENTS, worse))
        assert quality(CONTENTS, worse) < 1
        assert not np.array_equal(to_array(render(worse)), to_array(render(GOOD)))
    assert len(scores) > 8
