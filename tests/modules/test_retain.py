"""Keeping and removing: the projection in numbers, and in steps of a module."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lit_safety.__main__ import main
from lit_safety.modules import SCDPO, ProjectRetain
from lit_safety.modules.retain import rectified
from lit_safety.objectives import SafetyConstrainedDPO
from tests.helpers.small_fits import small_fit


def test_a_conflict_by_hand():
    """r = (-3, 4), g = (2, 0): r . g = -6, |g|^2 = 4, so r' = r + 1.5 g = (0, 4); the cosine is -6 / (5 x 2)."""
    kept, cosine = rectified(torch.tensor([-3.0, 4.0]), torch.tensor([2.0, 0.0]))
    assert kept.tolist() == [0.0, 4.0]
    assert float(cosine) == pytest.approx(-0.6)
    assert rectified(torch.tensor([-3.0, 4.0]), torch.tensor([2.0, 0.0]), True)[0].tolist() == [0.0, 4.0]


def test_where_they_agree_nothing_is_taken_out_and_aegis_uses_none_of_it():
    retain, remove = torch.tensor([3.0, 4.0]), torch.tensor([2.0, 1.0])
    assert torch.equal(rectified(retain, remove)[0], retain)
    assert rectified(retain, remove, conflicts_only=True)[0].tolist() == [0.0, 0.0]


def test_at_the_start_there_is_nothing_to_keep():
    """Policy and reference are one function: r is 0, and so is g at times."""
    kept, cosine = rectified(torch.zeros(2), torch.tensor([1.0, 1.0]))
    assert kept.tolist() == [0.0, 0.0]
    assert float(cosine) == 0
    assert torch.isfinite(rectified(torch.ones(2), torch.zeros(2))[0]).all()


def test_the_weight_grows():
    assert [ProjectRetain(grow=4).weight(step) for step in (0, 1, 4, 9)] == [0.0, 0.25, 1.0, 1.0]
    assert ProjectRetain().weight(0) == 1.0


class Numbers(torch.nn.Module):
    """Two numbers that are trained, as a module of ours looks to `ProjectRetain`."""

    def __init__(self, accumulated: int = 1) -> None:
        super().__init__()
        self.x = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        self.trainer = type("T", (), {"accumulate_grad_batches": accumulated, "world_size": 1})()
        self.global_step = 0

    def trainable_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [("x", self.x)]


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_step_by_hand(accumulated: int):
    """Removing 2 x_0 has the gradient (2, 0), keeping -3 x_0 + 4 x_1 (-3, 4): the step gets (2, 0) + (0, 4)."""
    module, retain = Numbers(accumulated), ProjectRetain()
    for _ in range(accumulated):
        keeping = -3 * module.x[0] + 4 * module.x[1]
        retain.hold(module, keeping)  # type: ignore[arg-type]
        ((2 * module.x[0] + keeping) / accumulated).backward()
    logs = retain.project(module)  # type: ignore[arg-type]
    assert module.x.grad is not None
    torch.testing.assert_close(module.x.grad, torch.tensor([2.0, 4.0]))
    assert float(logs["retain/cosine"]) == pytest.approx(-0.6)


def test_what_keeps_is_the_anchor():
    from lit_safety.objectives.objective import PairErrors, PairLabels

    errors = PairErrors(*[torch.tensor([0.1, 0.2])] * 4, drift=torch.tensor([0.5, 0.25]))
    labels = PairLabels(torch.tensor([1.0, 0.0]), *[torch.tensor([[0.0, 1.0]] * 2)] * 3)
    keeping = SafetyConstrainedDPO(anchor_weight=20.0)(errors, labels).keeping
    assert keeping is not None
    assert keeping.tolist() == [10.0, 0.0]
    assert SafetyConstrainedDPO()(errors, labels).keeping is None


def test_nothing_to_keep_is_said():
    with pytest.raises(ValueError, match="anchor_weight"):
        SCDPO("anywhere", retain=ProjectRetain())


def test_ranks_and_micro_batches_take_the_same_steps(tiny_pipeline: Path, pair_shards: Path, tmp_path: Path):
    """8 pairs at once, 4 twice, and 2 ranks of 4, with the projection and without: only the last one differs."""
    from tests.helpers.ranks import run

    # With a rate of 1 four steps grow the weights from 0.4 to 34, and rounding with them.
    sgd = {
        "model.init_args.pretrained": tiny_pipeline, "model.init_args.lora.init_args.rank": 4,
        "model.init_args.optimizer.class_path": "torch.optim.SGD", "model.init_args.optimizer.init_args.lr": 0.05,
        "model.init_args.lr_scheduler": "null", "trainer.gradient_clip_val": "null", "trainer.limit_val_batches": 0,
        "trainer.val_check_interval": "null", "data.init_args.batch_size": 4,
        "trainer.callbacks": "[{class_path: lit_safety.callbacks.ExportAdapter}]",
    }  # fmt: skip
    project = ["--model.init_args.retain", "lit_safety.modules.ProjectRetain"]
    found = {}

    def fit(name: str, how: Callable[[list[str]], object], *more: str) -> None:
        how(small_fit("fit", ["scdpo.yaml"], tmp_path / name, pair_shards, sgd, more))
        folder = tmp_path / name / "scdpo" / "latest" / "adapter"
        found[name] = load_file(folder / "pytorch_lora_weights.safetensors")

    def here(arguments: list[str]) -> None:
        assert main(arguments) == 0

    fit("whole", here, *project, "--data.init_args.batch_size", "8")
    fit("added", here, "--data.init_args.batch_size", "8")
    fit("parts", here, *project, "--trainer.accumulate_grad_batches", "2")
    ranks = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    fit("ranks", lambda arguments: run(arguments, tmp_path / "logs"), *project, *ranks)

    def apart(name: str) -> float:
        return max(float((found[name][key] - value).abs().max()) for key, value in found["whole"].items())

    update = max(float(value.abs().max()) for key, value in found["whole"].items() if "lora_B" in key)
    assert apart("parts") < 1e-3 * update
    assert apart("ranks") < 1e-3 * update
    assert apart("added") > 1e-2 * update
