"""Several cost models as one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lit_safety.core.errors import UserError
from lit_safety.cost_model.ensemble import CostEnsemble, load_ensemble
from lit_safety.cost_model.network import CostAdapter, CostScorer

TOY = Path(__file__).parents[2] / "data" / "toyworld" / "cost_model"


def scorer(tower: object, seed: int, bias: float = 0.0) -> CostScorer:
    torch.manual_seed(seed)
    adapter = CostAdapter(4, width=3)
    torch.nn.init.normal_(adapter.head.weight)
    return CostScorer(tower, adapter, 2.0, bias)  # type: ignore[arg-type]


class Tower:
    """Features are the pixels' means; counts how often it runs."""

    features = "embedding"
    device = torch.device("cpu")

    def __init__(self, sha256: str = "one") -> None:
        self.sha256, self.runs = sha256, 0

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        return images.mean((2, 3)).repeat(1, 2)[:, :4]


@pytest.mark.parametrize("same", [True, False])
def test_the_cost_is_the_mean_and_deviations_above_it(same: bool) -> None:
    towers = [Tower("one"), Tower("one" if same else "two")]
    heads = [scorer(tower, seed, bias=float(seed)) for seed, tower in enumerate(towers)]
    images = torch.rand(5, 3, 8, 8)
    alone = torch.stack([one.costs(images) for one in heads])
    runs = [tower.runs for tower in towers]
    found = CostEnsemble(heads, 1.5).costs(images)
    torch.testing.assert_close(found, alone.mean(0) + 1.5 * (alone[0] - alone[1]).abs() / 2)
    assert [tower.runs - before for tower, before in zip(towers, runs, strict=True)] == [1, 0 if same else 1]


def test_one_cost_model_is_itself() -> None:
    one = scorer(Tower(), 0)
    images = torch.rand(5, 3, 8, 8)
    assert torch.equal(CostEnsemble([one], 3.0).costs(images), one.costs(images))
    assert CostEnsemble([one], 3.0).costs([]).shape == (0,)


def test_what_is_no_ensemble_is_refused() -> None:
    with pytest.raises(UserError, match="twice"):
        load_ensemble([str(TOY), str(TOY)], 1.0)
    with pytest.raises(ValueError, match="pessimism"):
        CostEnsemble([scorer(Tower(), 0)], -1.0)
    with pytest.raises(ValueError, match="at least one"):
        CostEnsemble([])
