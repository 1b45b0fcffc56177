"""SC-DPO's costs: the shard's, else the cost model's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.trainer.states import RunningStage

from lit_safety.core.errors import UserError
from lit_safety.modules import SCDPO
from lit_safety.objectives import SafetyConstrainedDPO
from tests.helpers.batches import batch_of

NAN = float("nan")


class Scorer:
    """The mean brightness of an image as its cost."""

    def __init__(self) -> None:
        self.given = 0

    def to(self, device: torch.device) -> Scorer:
        return self

    def costs(self, images: torch.Tensor) -> torch.Tensor:
        self.given += len(images)
        return images.mean((1, 2, 3))


@pytest.fixture
def module(tiny_pipeline: Path) -> SCDPO:
    module = SCDPO(str(tiny_pipeline), SafetyConstrainedDPO(beta=100.0, cost_weight=1.0))
    module.configure_model()
    module._scorer = Scorer()
    return module


def test_pairs_without_costs_are_scored_once_each(module: SCDPO):
    batch = batch_of([0, 1], costs=(NAN, NAN))
    labels = module.labels(batch)
    expected = torch.stack([batch.chosen.mean((1, 2, 3)), batch.rejected.mean((1, 2, 3))], dim=1)
    torch.testing.assert_close(labels.cost, expected)
    assert batch.cost.isnan().all()
    module.labels(batch)
    module.labels(batch_of([1, 2], costs=(NAN, NAN)))
    assert module._scorer.given == 6  # three pairs, two images each


def test_a_pairs_cost_does_not_depend_on_its_batch(module: SCDPO, tiny_pipeline: Path):
    """Scored in a batch of 3 or alone: to the bit, so that a resumed run has the same costs."""
    together = module.labels(batch_of([0, 1, 2], costs=(NAN, NAN))).cost
    module._costs.clear()
    alone = torch.cat([module.labels(batch_of([row], costs=(NAN, NAN))).cost for row in range(3)])
    assert torch.equal(together, alone)


def test_a_key_in_another_set_is_another_pair(module: SCDPO):
    """Pair 0 of each set has images of its own; the sanity check reads validation pairs."""
    stages = [RunningStage.TRAINING, RunningStage.VALIDATING, RunningStage.TESTING]
    for row, stage in enumerate(stages):
        module._trainer = SimpleNamespace(state=SimpleNamespace(stage=stage), datamodule=None)
        batch = replace(batch_of([row], costs=(NAN, NAN)), keys=["0000"])
        expected = [batch.chosen.mean().item(), batch.rejected.mean().item()]
        assert module.labels(batch).cost[0].tolist() == pytest.approx(expected)
    module._trainer = SimpleNamespace(state=SimpleNamespace(stage=RunningStage.SANITY_CHECKING), datamodule=None)
    module.labels(replace(batch_of([1], costs=(NAN, NAN)), keys=["0000"]))
    assert module._scorer.given == 6  # three pairs, two images each


def test_nothing_is_scored_for_an_objective_that_reads_no_costs(module: SCDPO):
    """Not even asked for: pairs out of a cache have no images to score."""
    module.objective.cost_weight = 0.0
    module.labels(replace(batch_of([0], costs=(NAN, NAN)), chosen=None, rejected=None))
    assert module._scorer.given == 0


def test_known_costs_stay(module: SCDPO):
    assert module.labels(batch_of([0], costs=(-0.5, 0.25))).cost.tolist() == [[-0.5, 0.25]]
    assert module._scorer.given == 0


def test_mirrored_pairs_without_costs_are_refused(module: SCDPO):
    module._trainer = SimpleNamespace(datamodule=SimpleNamespace(flip=True))
    with pytest.raises(UserError, match=r"sample 0000 has no cost, .*`data.init_args.flip`.*shards score"):
        module.labels(batch_of([0], costs=(NAN, NAN)))


def test_without_a_cost_model_they_are_refused_by_name(tiny_pipeline: Path):
    module = SCDPO(str(tiny_pipeline), SafetyConstrainedDPO(cost_weight=1.0))
    module.configure_model()
    says = "sample 0000 has no cost.*`model.init_args.cost_model`.*label_costs: true.*cost_weight: 0`"
    with pytest.raises(UserError, match=says):
        module.labels(batch_of([0], costs=(NAN, NAN)))


@pytest.fixture
def by_label(tiny_pipeline: Path) -> SCDPO:
    module = SCDPO(str(tiny_pipeline), SafetyConstrainedDPO(beta=100.0, cost_weight=1.0), label_costs=True)
    module.configure_model()
    return module


def test_labels_stand_for_costs_and_known_costs_stay(by_label: SCDPO):
    """(chosen, rejected): both labels known; none known but ordered by safety; one known; a cost of its own."""
    batch = batch_of(range(4), costs=(NAN, NAN))
    batch.harmful = torch.tensor([[0.0, 0.0], [NAN, NAN], [1.0, NAN], [0.0, 1.0]])
    batch.has_harmful = [True, False, False, True]
    batch.cost[3] = torch.tensor([-0.3, 0.7])
    batch.has_cost[3] = True
    costs = by_label.labels(batch).cost
    assert torch.equal(costs, torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, 1.0], [-0.3, 0.7]]))
    assert batch.has_cost == [False, False, False, True]


def test_a_pair_without_labels_that_quality_ordered_is_refused_by_name(by_label: SCDPO):
    """It is not known which of its images is harmful."""
    batch = batch_of([0, 1], costs=(NAN, NAN))
    batch.harmful[1], batch.has_harmful[1], batch.orders[1] = NAN, False, "quality"
    with pytest.raises(UserError, match=rf"{batch.keys[1]}.*label"):
        by_label.labels(batch)


def test_costs_in_two_units_are_refused(tiny_pipeline: Path):
    with pytest.raises(ValueError, match="label_costs"):
        SCDPO(str(tiny_pipeline), cost_model="folder", label_costs=True)
