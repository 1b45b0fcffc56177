from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from lit_safety.judges.toy.objects import CONCEPTS, LABELS, LOOKALIKES
from lit_safety.worlds.toyworld.emblems import EMBLEMS
from lit_safety.worlds.toyworld.sampling import draw_scene, grade
from lit_safety.worlds.toyworld.scene import CANVAS, SIDE, SLOTS, Scene, Thing, render, to_array
from lit_safety.worlds.toyworld.seeds import SEEDS, stream

GUN = Thing("gun", 1, SLOTS[1], 70)
CAT = Thing("cat", 0, SLOTS[0], 70, "red")


def test_a_seed_always_draws_the_same_scene_and_seeds_differ() -> None:
    first, again, other = (render(draw_scene(stream("checks", i))[0]) for i in (5, 5, 6))
    assert np.array_equal(to_array(first), to_array(again))
    assert not np.array_equal(to_array(first), to_array(other))


def test_scene_without_its_harm_differs_only_inside_the_harms_box() -> None:
    seen = 0
    for index in range(60):
        rng = stream("checks", index)
        scene = grade(rng, draw_scene(rng)[0])
        if scene.harm is None:
            assert np.array_equal(to_array(render(scene)), to_array(render(scene, with_harm=False)))
            continue
        seen += 1
        changed = (to_array(render(scene)) != to_array(render(scene, with_harm=False))).any(2)
        assert changed.any()
        cell, reach = CANVAS // SIDE, 1.1 * scene.harm.radius
        rows, columns = np.nonzero(changed)
        assert (scene.harm.x - reach) / cell - 1 <= columns.min()
        assert columns.max() <= (scene.harm.x + reach) / cell
        assert (scene.harm.y - reach) / cell - 1 <= rows.min()
        assert rows.max() <= (scene.harm.y + reach) / cell
    assert seen > 20


@pytest.mark.parametrize(
    ("change", "values"), [("radius", (18, 24, 30)), ("visible", (0.5, 0.8, 1.0)), ("count", (1, 2))]
)
def test_severity_grows_with_size_visibility_and_count(change: str, values: tuple[float, ...]) -> None:
    severities = [Scene("park", (CAT,), replace(GUN, **{change: value})).severity for value in values]
    assert severities == sorted(set(severities))
    assert 0 < severities[0] <= severities[-1] <= 1.25
    assert Scene("park", (CAT,)).severity == 0


@pytest.mark.parametrize(("small", "large"), [({"radius": 20}, {"radius": 30}), ({"visible": 0.5}, {"visible": 0.9})])
def test_a_severer_harm_changes_more_of_the_image(small: dict[str, float], large: dict[str, float]) -> None:
    empty = to_array(render(Scene("street", ()))).astype(int)
    changed = [
        int((abs(to_array(render(Scene("street", (), replace(GUN, **how)))) - empty).sum(2) > 0).sum())
        for how in (small, large)
    ]
    assert changed[0] < changed[1]


def test_no_two_emblems_look_alike_to_the_pixel() -> None:
    images = [to_array(render(Scene("park", (Thing(name, 0, SLOTS[0], 70, "red"),)))).astype(int) for name in LABELS]
    for i, one in enumerate(images):
        for name, other in zip(LABELS[:i], images[:i], strict=True):
            different = (abs(one - other).max(2) > 60).sum()
            assert different >= 40, f"{LABELS[i]} and {name} differ in only {different} pixels"


def test_eight_categories_of_three_concepts_each_with_a_lookalike_that_is_drawn() -> None:
    from lit_safety.core.categories import CATEGORIES

    of = [concept.category for concept in CONCEPTS.values()]
    assert {category: of.count(category) for category in CATEGORIES} == dict.fromkeys(CATEGORIES, 3)
    assert set(LABELS) == set(EMBLEMS)
    assert len(LABELS) == len(set(LABELS))
    assert set(LOOKALIKES).isdisjoint(CONCEPTS)


def test_seed_ranges_are_disjoint_and_kept_to() -> None:
    ranges = sorted(SEEDS.values(), key=lambda seeds: seeds.start)
    assert all(before.stop <= after.start for before, after in pairwise(ranges))
    with pytest.raises(ValueError, match="judge_a"):
        stream("judge_a", len(SEEDS["judge_a"]))
