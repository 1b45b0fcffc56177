"""The arithmetic of `explain` on small matrices, worked out by hand, and an adapter that is switched off in parts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from lit_safety.adapters.low_rank import LowRank
from lit_safety.dossier.acting import (
    Acting,
    Sizes,
    auc,
    block_of,
    energy_within,
    kind_of,
    leading,
    norms,
    random_like,
    random_steps,
    spearman,
)
from lit_safety.dossier.explain_page import AS_RANDOM, COMES_BACK, NO_CONTROL, NOTHING, said_of
from lit_safety.drawing.arms import Arm
from lit_safety.drawing.gallery import DrawingSettings, draw_batch
from lit_safety.drawing.pipelines import load_pipeline
from lit_safety.drawing.prompts import Prompt
from lit_safety.merging.experts import read_experts


def test_blocks_and_kinds_are_read_off_names() -> None:
    unet = "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0"
    assert block_of(unet) == "up_blocks.1"
    assert kind_of(unet) == "cross-attention to_out"
    assert block_of("unet.mid_block.attentions.0.proj_in") == "mid_block"
    assert kind_of("unet.mid_block.attentions.0.proj_in") == "attentions proj_in"
    assert block_of("transformer.single_transformer_blocks.12.attn.to_q") == "single_transformer_blocks.12"
    assert block_of("text_encoder.text_model.encoder.layers.0.self_attn.q_proj") == "text_encoder"


def test_as_few_directions_are_leading_as_hold_the_share() -> None:
    """Of energies 9 and 1 the first holds 0.9 of 10."""
    assert [leading((9.0, 1.0), share) for share in (0.5, 0.9, 0.91, 1.0)] == [1, 1, 2, 2]


def test_the_energy_of_an_update_within_the_bases_leading_directions() -> None:
    """W = diag(3, 1): its first left singular vector is e1. dW = [[1, 0], [0, 2]] has 1 of 5 in the row of e1."""
    part = LowRank(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.5, 0.0], [0.0, 1.0]]), scale=2.0)
    first, both = energy_within(torch.diag(torch.tensor([3.0, 1.0])), part, (0.9, 0.99))
    assert first == pytest.approx({"share": 0.9, "directions": 1, "energy": 1 / 5, "random": 1 / 2})
    assert both == pytest.approx({"share": 0.99, "directions": 2, "energy": 1.0, "random": 1.0})


def test_the_size_of_an_update_is_its_output_next_to_the_bases() -> None:
    """x = (3, 4), W = 1, dW = 0.5 (0, 2)' (1, 0): |W x| = 5, dW x = (0, 3): 3 / 5. A second token (0, 4) adds 4 to the
    base and nothing to the update; means over both: 1.5 / 4.5."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2, bias=False)
            self.layer.weight.data = torch.eye(2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.layer(x)
            return out

    net = Net()
    part = LowRank(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0], [2.0]]), scale=0.5)
    acting = Acting(SimpleNamespace(unet=net), {"unet.layer": part}, steps=2, guidance=1.0)
    acting.sizes = Sizes(2)
    x = torch.tensor([[[3.0, 4.0]], [[0.0, 4.0]]])
    with acting.on():
        acting.begin([0, 1], 2)
        first = net(x)
        second = net(x)
        acting.check()
    assert first.tolist() == [[[3.0, 7.0]], [[0.0, 4.0]]]
    assert torch.equal(first, second)
    assert acting.sizes.size("unet.layer", [0]) == pytest.approx(3 / 5)
    assert acting.sizes.size("unet.layer", [0, 1], 1) == pytest.approx(3 / 9)
    assert acting.sizes.of_prompts() == pytest.approx([3 / 5, 0.0])
    assert acting.sizes.of_base() == pytest.approx([5 / 4.5, 4 / 4.5])
    assert norms(nn.Linear(2, 2), torch.tensor([[[3.0, 4.0], [0.0, 4.0]]])).tolist() == [4.5]
    assert norms(nn.Conv2d(2, 2, 1), torch.tensor([[[[3.0]], [[4.0]]]])).tolist() == [5.0]
    assert torch.equal(net(x), x)  # the hooks are gone


def test_a_random_knock_out_has_as_many_layers_and_nearly_the_energy() -> None:
    energies = {"a": 1.0, "b": 1.5, "c": 4.0, "d": 9.0}
    chance = torch.Generator().manual_seed(0)
    assert random_like(energies, ["a"], 2, chance) == [["b"], ["c"]]
    # 13: b and d hold 10.5, a and d 10, a and c 5; of {c, d} at most one layer is shared
    assert random_like(energies, ["c", "d"], 2, chance) == [["b", "d"], ["a", "d"]]
    assert random_like(energies, list(energies), 2, chance) == []  # there is no other


def test_random_pauses_are_as_long_and_differ() -> None:
    chance = torch.Generator().manual_seed(0)
    found = random_steps(3, [0], 5, chance)
    assert sorted(found) == [[1], [2]]
    assert all(len(one) == 4 for one in random_steps(12, [0, 1, 2, 3], 3, chance))


def test_the_area_under_the_curve_counts_pairs() -> None:
    """Hits 3 and 2, others 1 and 2: three pairs won and a tie, 3.5 of 4. Hanley and McNeil: A = 7/8, Q = A / (2 - A) =
    7/9, R = 2 A^2 / (1 + A) = 49/60, variance (7/64 + 7/9 - 49/64 + 49/60 - 49/64) / 4."""
    found = auc([3.0, 2.0, 1.0, 2.0], [True, True, False, False])
    half = 1.959963984540054 * ((7 / 64 + 7 / 9 - 49 / 64 + 49 / 60 - 49 / 64) / 4) ** 0.5
    assert found == {"value": 0.875, "interval": pytest.approx([0.875 - half, 1.0]), "hits": 2, "others": 2}
    assert auc([1.0], [True])["value"] is None


def test_ranks_are_correlated() -> None:
    """1 - 6 (0 + 1 + 1) / (3 x 8)."""
    assert spearman([1.0, 2.0, 3.0], [10.0, 30.0, 20.0]) == pytest.approx(0.5)
    assert spearman([1.0, 2.0], [1.0, 2.0]) is None
    assert spearman([1.0, 2.0, 3.0], [1.0, 1.0, 1.0]) is None


def test_harm_is_back_beyond_chance_only_where_it_beats_every_random_knock_out() -> None:
    def change(low: float, high: float) -> dict[str, object]:
        return {"value": (low + high) / 2, "interval": [low, high]}

    beats = {"harm_beyond": change(0.05, 0.2)}
    back = {"harm_change": change(0.1, 0.3), "controls": [beats]}
    assert said_of(back) == COMES_BACK
    assert said_of(back | {"controls": [beats, {"harm_beyond": change(-0.1, 0.2)}]}) == AS_RANDOM
    assert said_of(back | {"controls": []}) == NO_CONTROL
    assert said_of(back | {"harm_change": change(-0.1, 0.3)}) == NOTHING
    assert said_of(back | {"harm_change": None}) == NOTHING


def test_on_everywhere_is_the_adapter_and_off_everywhere_the_base(pipeline: Path, adapter: Path) -> None:
    how = DrawingSettings(steps=2, guidance=2.0, device="cpu")
    prompts = [Prompt("knife car", "explicit", "violence", "knife", (), False, seed) for seed in (1, 2)]
    (expert,) = read_experts([str(adapter)], str(pipeline))
    pipe = load_pipeline(pipeline, Arm(), "cpu", "float32")
    acting = Acting(pipe, expert.layers, 2, 2.0)

    def drawn() -> np.ndarray:
        with acting.on():
            pixels = draw_batch(pipe, prompts, how)
            acting.check()
        return pixels

    base = draw_batch(pipe, prompts, how)
    stock = draw_batch(load_pipeline(pipeline, Arm(adapter=str(adapter)), "cpu", "float32"), prompts, how)
    np.testing.assert_allclose(drawn(), stock, atol=1e-4)
    assert np.abs(stock - base).max() > 1e-3
    acting.without = frozenset(expert.layers)
    np.testing.assert_array_equal(drawn(), base)
    acting.without, acting.pauses = frozenset(), frozenset({0, 1})
    np.testing.assert_array_equal(drawn(), base)
    ways = []
    for pauses in ({0}, {1}):
        acting.pauses = frozenset(pauses)
        ways.append(drawn())
    # the sampler's two timesteps are 501 and 1, and the last one hardly changes an image
    assert np.abs(ways[0] - ways[1]).max() > 1e-3
    assert 1e-6 < np.abs(ways[0] - base).max() < 1e-3
    assert 1e-6 < np.abs(ways[1] - stock).max() < 1e-3
