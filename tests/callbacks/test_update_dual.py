"""The dual variable of Constrained DPO under training: drawn images, scored, lambda moved and kept."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from PIL.Image import Image

from lit_safety.callbacks import UpdateDual
from lit_safety.core.errors import UserError
from lit_safety.data import PreferenceDataModule
from lit_safety.modules import PreferenceModule
from lit_safety.modules.checks import warn_if_not_moved
from lit_safety.modules.preference import Drawing
from lit_safety.objectives import ConstrainedDPO, DiffusionDPO


class Scorer:
    """Calls every image `cost`, and remembers how many it was given."""

    def __init__(self, cost: float) -> None:
        self.cost = cost
        self.given: list[int] = []

    def to(self, device: torch.device) -> Scorer:
        return self

    def costs(self, images: list[Image]) -> torch.Tensor:
        self.given.append(len(images))
        return torch.full((len(images),), self.cost)


def shards(folder: Path) -> Path:
    from PIL import Image as Pillow

    from lit_safety.data.format.writer import ShardWriter

    with ShardWriter(folder) as writer:
        for i in range(8):
            about = {
                "prompt": "a gun", "prompt_kind": "harmful", "categories": ["violence"], "order": "quality",
                "harmful": {"chosen": False, "rejected": True}, "cost": {"chosen": -1.0, "rejected": 1.0},
                "score": {"chosen": 0.5, "rejected": 0.9},
            }  # fmt: skip
            writer.write(f"{i:03d}", about, *(Pillow.new("RGB", (32, 32), (i * 30, 0, c)) for c in (0, 255)))
    return folder


@pytest.fixture
def fit(tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from lightning.pytorch import Trainer

    data = shards(tmp_path / "shards")

    def fit(
        scorer: Scorer, steps: int = 4, objective=None, checkpoint=None, callbacks=None, **settings
    ) -> tuple[ConstrainedDPO, Trainer]:
        monkeypatch.setattr("lit_safety.callbacks.update_dual.load_cost_model", lambda _: scorer)
        objective = objective or ConstrainedDPO(beta=100.0, limit=0.0, dual=1.0, dual_rate=0.5)
        module = PreferenceModule(str(tiny_pipeline), objective, drawing=Drawing(steps=1))
        trainer = Trainer(
            max_steps=steps, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=tmp_path, enable_checkpointing=False,
            callbacks=[UpdateDual("cost", **settings)] if callbacks is None else callbacks,
        )  # fmt: skip
        trainer.fit(module, datamodule=PreferenceDataModule(str(data), batch_size=4), ckpt_path=checkpoint)
        return objective, trainer

    return fit


def test_lambda_follows_the_cost_of_what_the_policy_draws(fit):
    """4 steps, an update every 2: lambda = 1 + 2 x 0.5 x (0.4 - 0) = 1.4; 3 images an update."""
    scorer = Scorer(0.4)
    objective, trainer = fit(scorer, every_n_steps=2, images=3)
    assert objective.dual == pytest.approx(1.4)
    assert scorer.given == [3, 3]
    assert trainer.callback_metrics["constrained/expected_cost"] == pytest.approx(0.4)
    assert trainer.callback_metrics["constrained/dual"] == pytest.approx(1.4)


def test_a_safe_policy_lowers_lambda_and_never_below_0(fit):
    """1 - 0.5 x 1 = 0.5, then 0, then max(0, -0.5) = 0."""
    assert fit(Scorer(-1.0), steps=3, every_n_steps=1)[0].dual == 0.0


def test_it_goes_on_where_it_was_after_a_resume(fit, tmp_path: Path):
    """2 updates, a checkpoint, 2 more: 1 + 4 x 0.5 x 0.4 = 1.8, and no update is made twice."""
    objective, trainer = fit(Scorer(0.4), every_n_steps=1, steps=2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    scorer = Scorer(0.4)
    objective, _ = fit(scorer, every_n_steps=1, steps=4, checkpoint=tmp_path / "half.ckpt")
    assert len(scorer.given) == 2
    assert objective.dual == pytest.approx(1.8)


def test_a_limit_out_of_reach_is_said_after_a_while(fit):
    with pytest.warns(UserWarning, match="stayed above `objective.init_args.limit` 0 for 3 updates"):
        fit(Scorer(0.4), steps=3, every_n_steps=1, patience=3)


def test_a_cost_that_falls_is_no_reason_to_warn(fit):
    class Falling(Scorer):
        def costs(self, images: list[Image]) -> torch.Tensor:
            self.cost *= 0.8
            return super().costs(images)

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*stayed above.*")
        fit(Falling(0.4), steps=4, every_n_steps=1, patience=4)


@pytest.fixture
def watch():
    """What a callback of patience 2 says of these expected costs with limit 0."""

    def watch(*costs: float, patience: int = 2) -> list[str]:
        callback, objective = UpdateDual("cost", patience=patience), ConstrainedDPO(limit=0.0)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            for cost in costs:
                callback._watch(cost, objective)
        return [str(one.message) for one in found]

    return watch


@pytest.mark.parametrize(
    "costs",
    [(0.5, 0.49, 0.51, 0.48, 0.52, 0.50), (0.5, 0.499, 0.498, 0.497, 0.496, 0.495)],
    ids=["noise", "by a hair"],
)
def test_a_stall_that_every_window_hides_is_said_after_three(watch, costs: tuple[float, ...]):
    """Patience 2: each pair of costs falls. After 6 updates it is said; below the limit in between, never."""
    (said,) = watch(*costs)
    assert "for 6 updates and falls too slowly" in said
    assert f"({costs[4]:.2f}, then {costs[5]:.2f} in the last 2)" in said
    assert watch(*costs[:5]) == []
    assert watch(*costs[:4], -0.1, *costs[4:]) == []


def test_after_a_warning_the_count_starts_again(watch):
    """Patience 2: 0.5, 0.5 stalls; so does 0.4, 0.4; then 0.3, 0.2 falls."""
    assert len(watch(0.5, 0.5, 0.4, 0.4, 0.3, 0.2)) == 2


def test_a_patience_of_one_update(watch):
    (said,) = watch(0.5, patience=1)
    assert "for 1 updates and does not fall (0.50, then 0.50 in the last 1)" in said


@pytest.mark.parametrize("callbacks", [None, []], ids=["with", "without"])
def test_a_constant_lambda_is_said_at_the_start(fit, callbacks):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        objective, _ = fit(Scorer(0.4), steps=1, every_n_steps=1, callbacks=callbacks)
    said = [str(one.message) for one in found if "UpdateDual" in str(one.message)]
    if callbacks is None:
        assert said == []
        assert objective.dual == pytest.approx(1.2)
        return
    (warning,) = said
    assert "ConstrainedDPO" in warning
    assert "`dual`" in warning
    assert "--trainer.callbacks+=lit_safety.callbacks.UpdateDual" in warning
    assert objective.dual == 1.0


class OwnObjective(ConstrainedDPO):
    """Somebody's own, moved by their own callback."""


class MovesOwn(Callback):
    moves = OwnObjective


@pytest.mark.parametrize(
    ("objective", "callbacks", "told"),
    [
        (ConstrainedDPO(), [UpdateDual("cost")], False),
        (OwnObjective(), [UpdateDual("cost")], False),
        (OwnObjective(), [Callback(), MovesOwn()], False),
        (ConstrainedDPO(), [MovesOwn()], True),
        (ConstrainedDPO(), [type("UpdateDual", (Callback,), {})()], True),
        (DiffusionDPO(), [], False),
    ],
    ids=["its own", "a subclass", "another callback", "of another objective", "only the name", "nothing to move"],
)
def test_a_callback_declares_which_objective_it_moves(objective, callbacks, told: bool):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        warn_if_not_moved(objective, callbacks)
    assert bool(found) is told


def test_it_is_refused_with_another_objective(fit):
    with pytest.raises(UserError, match="the objective is DiffusionDPO"):
        fit(Scorer(0.1), objective=DiffusionDPO())


def test_a_cost_that_is_no_number_stops_the_run(fit):
    with pytest.raises(UserError, match="cannot score the policy"):
        fit(Scorer(float("nan")), every_n_steps=1)


def test_numbers_below_1_are_refused():
    with pytest.raises(UserError, match="every_n_steps"):
        UpdateDual("cost", every_n_steps=0)


def test_the_rectified_form_holds_each_prompt(fit):
    """Images of 0.4 and -1: their mean is below the limit 0, but the one prompt's mean is so too; so lambda stays."""

    class Two(Scorer):
        def costs(self, images: list[Image]) -> torch.Tensor:
            super().costs(images)
            return torch.full((len(images),), 0.4 if len(self.given) % 2 else -1.0)

    scorer = Two(0.0)
    objective = ConstrainedDPO(beta=100.0, limit=0.0, dual=1.0, dual_rate=0.5, constraint="rectified")
    _, trainer = fit(scorer, steps=1, every_n_steps=1, images=3, per_prompt=2, objective=objective)
    assert scorer.given == [3, 3]
    assert objective.dual == 1.0
    assert trainer.callback_metrics["constrained/expected_cost"] == pytest.approx(-0.3)
    assert trainer.callback_metrics["constrained/excess"] == 0.0


def test_an_ensemble_is_pessimistic(fit, monkeypatch: pytest.MonkeyPatch):
    """Cost models that say 0.4 and 0: mean 0.2 + 2 x 0.2 = 0.6; lambda 1 + 0.5 x 0.6."""
    from lit_safety.cost_model.ensemble import pessimistic

    class Both(Scorer):
        def costs(self, images: list[Image]) -> torch.Tensor:
            return pessimistic(torch.tensor([[0.4], [0.0]]).expand(2, len(images)), 2.0)

    asked = []

    def load(folders: list[str], pessimism: float) -> Both:
        asked.append((folders, pessimism))
        return Both(0.0)

    monkeypatch.setattr("lit_safety.cost_model.ensemble.load_ensemble", load)
    objective, _ = fit(Scorer(9.0), steps=1, every_n_steps=1, ensemble=["second"], pessimism=2.0)
    assert asked == [(["cost", "second"], 2.0)]
    assert objective.dual == pytest.approx(1.3)


def test_pessimism_and_images_of_a_prompt_are_in_range():
    for settings in ({"pessimism": -1.0}, {"pessimism": float("nan")}, {"per_prompt": 0}):
        with pytest.raises(UserError, match=next(iter(settings))):
            UpdateDual("cost", **settings)
