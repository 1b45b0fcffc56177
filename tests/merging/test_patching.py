"""The formulas of a patch by hand, and where rows matter measured against autograd."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lit_safety.adapters.low_rank import LowRank
from lit_safety.backbones import load_backbone
from lit_safety.core.errors import UserError
from lit_safety.merging.experts import Expert
from lit_safety.merging.options import CalibrationOptions, RepairOptions
from lit_safety.merging.patching import (
    Sizes,
    Watch,
    joined,
    masked,
    masks,
    patched,
    row_importance,
    thinned,
    top_rows,
)
from lit_safety.merging.repair import Repair, lost_prompts


def whole(rows: list[list[float]], scale: float = 1.0) -> LowRank:
    """A whole update as factors: b the identity."""
    a = torch.tensor(rows)
    return LowRank(a, torch.eye(len(a)), scale)


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_importance_by_hand():
    """dW = 2 [[1 -2], [3 0], [0 0]], E|x| = (1, 0.5), E|g| = (1, 2, 5):
    rows 1 (2 + 2) = 4 with |dW| = [[2 4], [6 0], [0 0]]: 2 * 1 + 4 * 0.5 = 4, 6 * 1 = 6, 0; times |g|: 4, 12, 0"""
    part = whole([[1.0, -2.0], [3.0, 0.0], [0.0, 0.0]], 2.0)
    assert row_importance(part, numbers(1, 0.5), numbers(1, 2, 5)).tolist() == [4.0, 12.0, 0.0]


def test_top_rows_by_hand():
    """Half of five is three, rounded up; of equals the first; a row without importance is none of them."""
    assert top_rows(numbers(1, 5, 3, 5, 3), 0.5).tolist() == [False, True, True, True, False]
    assert top_rows(numbers(0, 2, 0, 0), 1.0).tolist() == [False, True, False, False]
    assert not top_rows(numbers(1, 2), 0.0).any()
    assert top_rows(numbers(*range(1, 11)), 0.3).sum() == 3  # not four, by 0.3 * 10 in floating point


def test_the_mask_is_what_matters_for_the_repair_and_not_for_safety_by_hand():
    """Rows 1 to 4 matter for safety with 4, 3, 2, 1, for the repair with 0, 2, 3, 1. The half for safety is {1, 2},
    three quarters for the repair are {2, 3, 4}: the difference is {3, 4}."""
    one = Sizes(numbers(1), numbers(1, 1, 1, 1))
    safety = {"unet.q": whole([[4.0], [3.0], [2.0], [1.0]])}
    repair = {"unet.q": whole([[0.0], [2.0], [3.0], [1.0]]), "unet.k": whole([[1.0], [0.0], [2.0], [3.0]])}
    options = RepairOptions(safety_share=0.5, repair_share=0.75)
    found = masks(safety, repair, {"unet.q": one}, {"unet.q": one, "unet.k": one}, options)
    assert found["unet.q"].tolist() == [0.0, 0.0, 1.0, 1.0]
    assert found["unet.k"].tolist() == [1.0, 0.0, 1.0, 1.0]  # safety does nothing there
    # a layer that what was lost never reaches is left alone
    assert not masks(safety, repair, {}, {"unet.q": one}, options)["unet.k"].any()


def test_the_patched_update_by_hand():
    """1/2 [[2 4], [6 8]] + 3 (0, 1) [[1 1], [2 2]] = [[1 2], [3 4]] + [[0 0], [6 6]]; its rank is that of both."""
    safety, repair = whole([[2.0, 4.0], [6.0, 8.0]]), whole([[1.0, 1.0], [1.0, 1.0]], 2.0)
    repair = LowRank(repair.a[:1], torch.tensor([[0.5], [1.0]]), 2.0)
    found = patched(safety, repair, numbers(0, 1), 0.5, 3.0)
    assert found.delta().tolist() == [[1.0, 2.0], [9.0, 10.0]]
    assert found.rank == 3
    both = joined({"q": safety}, {"q": repair}, {"q": numbers(0, 1)}, 0.5, 3.0)["q"]
    assert both.delta().tolist() == found.delta().tolist()
    # the patch alone beside the adapter is the same sum
    beside = masked({"q": repair}, {"q": numbers(0, 1)})["q"].delta()
    assert (0.5 * safety.delta() + 3.0 * beside).tolist() == found.delta().tolist()
    # a layer that the adapter alone adapts stays as it is, to the bit
    assert joined({"q": safety}, {}, {}, 1.0, 1.0)["q"] is safety


def test_thinning_makes_up_for_what_it_drops():
    rows = torch.ones(4000, dtype=torch.bool)
    rows[:1000] = False
    found = thinned(rows, 0.75, torch.Generator().manual_seed(0))
    assert set(found.tolist()) == {0.0, 4.0}
    assert not found[:1000].any()
    assert float(found[1000:].mean()) == pytest.approx(1.0, abs=0.1)
    assert torch.equal(thinned(rows, 0.0, torch.Generator()), rows.double())


def test_sizes_are_means_over_tokens_of_inputs_and_gradients():
    """A linear layer and a convolution, L the sum of squares: dL/dy = 2 y."""
    torch.manual_seed(0)
    linear, conv = nn.Linear(3, 2), nn.Conv2d(2, 4, 3, padding=1)
    tokens, images = torch.randn(2, 5, 3), torch.randn(2, 2, 4, 4)
    for module in (linear, conv):
        module.requires_grad_(False)
    watch = Watch({"linear": linear, "conv": conv})
    with watch.watching():
        (linear(tokens).square().sum() + conv(images).square().sum()).backward()
    found = watch.sizes()
    torch.testing.assert_close(found["linear"].inputs, tokens.abs().mean((0, 1)).double())
    torch.testing.assert_close(found["linear"].gradients, (2 * linear(tokens)).abs().mean((0, 1)).double())
    channels = images.abs().mean((0, 2, 3)).double()
    torch.testing.assert_close(found["conv"].inputs, torch.stack([channels] * 9, 1).flatten())
    torch.testing.assert_close(found["conv"].gradients, (2 * conv(images)).abs().mean((0, 2, 3)).double())


def test_lost_is_what_the_base_shows_and_the_aligned_model_does_not():
    rows = ["a", "b", "c", "d", "a", "e"]
    yes, no, unknown = {"benign_recall": True}, {"benign_recall": False}, {"benign_recall": None}
    before = [yes, yes, no, {"benign_recall_lookalike": True}, yes, yes]
    after = [no, yes, no, {"benign_recall_lookalike": False}, no, unknown]
    assert lost_prompts(rows, before, after) == ["a", "d"]


def test_options_that_cannot_be_meant_are_named():
    for name, value in (("rank", 0), ("lr", 0.0), ("safety_share", 1.0), ("repair_share", 0.0), ("drop", 1.0),
                        ("strengths", []), ("strengths", [-1.0])):  # fmt: skip
        with pytest.raises(UserError, match=f"--repair.{name}"):
            RepairOptions(**{name: value})


def test_a_repair_brings_predictions_back_and_leaves_the_adapter_as_it_is(tiny_pipeline: Path):
    """On its examples the aligned model with the repair is nearer to the base than without; what is measured is of the
    aligned model, whether a repair is attached or not; linear layers and a convolution."""
    torch.manual_seed(0)
    block = "unet.mid_block.attentions.0.transformer_blocks.0"
    sizes = {f"{block}.attn1.to_q": (64, 64), f"{block}.attn1.to_v": (64, 64)}
    layers = {n: LowRank(0.3 * torch.randn(2, i), 0.3 * torch.randn(o, 2)) for n, (o, i) in sizes.items()}
    layers["unet.down_blocks.0.resnets.0.conv1"] = LowRank(
        0.1 * torch.randn(2, 288), 0.3 * torch.randn(32, 2), 1.0, (3, 3)
    )
    aligned = Expert("aligned", layers)
    options = RepairOptions(rank=4, steps=40, batch_size=4, lr=2e-2, levels=2)
    drawing = CalibrationOptions(steps=1, batch_size=2)

    def begin() -> tuple[Repair, object]:
        work = Repair(load_backbone(str(tiny_pipeline)), aligned, drawing, options)
        return work, work.examples(["a red cat", "a house"], 2)

    work, examples = begin()
    assert examples.latents.shape[0] == len(examples.prompts) == len(set(examples.keys)) == 4
    before = work.sizes(examples)
    loss = list(work.train(examples))
    assert sum(loss[-10:]) < 0.8 * sum(loss[:10])
    after = work.sizes(examples)
    assert before.keys() == after.keys() == layers.keys()
    for name, one in before.items():
        torch.testing.assert_close(one.inputs, after[name].inputs, rtol=1e-4, atol=1e-8)
        torch.testing.assert_close(one.gradients, after[name].gradients, rtol=1e-3, atol=1e-10)
        assert one.inputs.shape == (layers[name].shape[1],)
        assert one.gradients.shape == (layers[name].shape[0],)
    again, same = begin()
    assert list(again.train(same)) == loss  # a pure function of the seed
    update = work.updates()
    assert update["unet.down_blocks.0.resnets.0.conv1"].kernel == (3, 3)
    assert all(torch.equal(update[name].b, again.updates()[name].b) for name in update)
    rows = masks(layers, update, before, after, options)
    whole_update = joined(layers, update, rows, 1.0, 1.0)
    for name, part in layers.items():
        # rows that the mask leaves out are the aligned adapter's own
        kept = rows[name] == 0
        assert kept.any()
        torch.testing.assert_close(whole_update[name].delta()[kept], part.delta()[kept], rtol=1e-5, atol=1e-7)
        assert not torch.allclose(whole_update[name].delta()[~kept], part.delta()[~kept])
