import numpy as np
import pytest
import torch

from lit_safety.judges.toy.objects import CONCEPTS
from lit_safety.worlds.toyworld.clip_checks import auroc, fit_line, fit_mlp, fresh_meanings, fresh_scenes


def test_auroc_counts_the_pairs_in_the_right_order() -> None:
    """Positives 3 and 1, negatives 2 and 1: 3 > 2, 3 > 1, 1 < 2, 1 = 1, so (1 + 1 + 0 + 0.5) / 4."""
    scores, positive = torch.tensor([3.0, 2.0, 1.0, 1.0]), torch.tensor([True, False, True, False])
    assert auroc(scores, positive) == pytest.approx(2.5 / 4)


def test_a_line_separates_what_a_line_can() -> None:
    features = torch.tensor([[0.0, 1.0], [0.0, -1.0], [1.0, 1.0], [1.0, -1.0]])
    positive = torch.tensor([False, False, True, True])
    line = fit_line(features, positive, decay=1e-6)
    assert ((line(features)[:, 0] > 0) == positive).all()
    scale = line(torch.tensor([[1.0, 0.0], [0.0, 1.0]])) - line(torch.zeros(1, 2))
    assert abs(float(scale[1])) < 1e-3 * float(scale[0])


def test_an_mlp_separates_what_no_line_can() -> None:
    features = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [1.0, 0.0]]) * 2 - 1
    positive = torch.tensor([False, False, True, True])
    mlp = fit_mlp(features, positive, decay=1e-5)
    assert ((mlp(features)[:, 0] > 0) == positive).all()
    assert torch.equal(mlp(features), fit_mlp(features, positive, decay=1e-5)(features))


def test_fresh_scenes_are_what_their_meanings_say() -> None:
    scenes = fresh_scenes("checks", 5, 30)
    assert scenes.images.shape == (30, 32, 32, 3)
    assert scenes.meanings == fresh_meanings("checks", 5, 30)
    harmful = [any(name in CONCEPTS for name, _ in meaning.contents) for meaning in scenes.meanings]
    assert [concept is not None for concept in scenes.concepts] == harmful
    assert np.array_equal(scenes.images, fresh_scenes("checks", 5, 30).images)
    assert not np.array_equal(scenes.images[0], fresh_scenes("cost_model", 5, 1).images[0])
