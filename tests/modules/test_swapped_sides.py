import math

import torch

from lit_safety.data.reading.batch import PairBatch
from lit_safety.modules.psa import swapped


def batch() -> PairBatch:
    return PairBatch(
        keys=["a", "b"], seeds=[1, 2], prompts=["x", "y"], prompt_kinds=["clean"] * 2, categories=[(), ()],
        orders=["safety"] * 2, chosen=torch.zeros(2, 3, 4, 4), rejected=torch.ones(2, 3, 4, 4), clean=torch.ones(2),
        harmful=torch.tensor([[1.0, 0.0], [1.0, math.nan]]), cost=torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        has_cost=[True] * 2, score=torch.tensor([[5.0, 6.0], [7.0, 8.0]]), has_score=[True] * 2,
        has_harmful=[True, False], user_ids=[None] * 2, latents=torch.arange(2.0 * 2 * 2).view(2, 2, 2, 1, 1, 1),
        crops=torch.arange(24.0).view(2, 2, 6),
    )  # fmt: skip


def test_both_images_and_all_that_is_said_of_them_change_places():
    before = batch()
    after = swapped(before, torch.tensor([True, False]))
    assert after.chosen is not None
    assert after.rejected is not None
    assert after.latents is not None
    assert after.crops is not None
    assert (after.chosen[0] == 1).all()
    assert (after.rejected[0] == 0).all()
    assert (after.chosen[1] == 0).all()
    assert after.harmful[0].tolist() == [0.0, 1.0]
    assert after.cost.tolist() == [[2.0, 1.0], [3.0, 4.0]]
    assert after.score.tolist() == [[6.0, 5.0], [7.0, 8.0]]
    # (pair, side, mean and deviation)
    assert after.latents.flatten(2).tolist() == [[[2.0, 3.0], [0.0, 1.0]], [[4.0, 5.0], [6.0, 7.0]]]
    assert after.crops[0, 0].tolist() == [6.0, 7.0, 8.0, 9.0, 10.0, 11.0]
    assert after.crops[1, 0, 0] == 12.0
    assert after.seeds == before.seeds


def test_a_batch_of_latents_has_no_images():
    cached = batch()
    cached.chosen = cached.rejected = None
    assert swapped(cached, torch.tensor([True, True])).chosen is None
