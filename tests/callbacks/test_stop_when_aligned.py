"""A fit that ends by what it draws, and leaves the best weights that it had."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lit_safety.__main__ import main
from lit_safety.callbacks import StopWhenAligned
from lit_safety.callbacks.stop_when_aligned import recognised
from lit_safety.core.errors import UserError
from tests.helpers.documents import TOYWORLD
from tests.helpers.small_fits import small_fit

PROMPTS = TOYWORLD / "prompts" / "val.csv"


def test_a_row_is_recognised_when_its_own_reference_is_the_nearest() -> None:
    """Rows at angles 0, 50 and 95 degrees, references at 0, 60 and 90 degrees: 50 is nearest to 60, 95 to 90. Turned to
    40, the second is still nearest to 60 (20 away, and 40 from 0); at 20 it is nearest to 0."""
    reference = torch.tensor([0.0, 60.0, 90.0])
    for second, expected in ((50.0, 1.0), (40.0, 1.0), (20.0, 2 / 3)):
        angles = torch.tensor([0.0, second, 95.0])
        rows, others = (torch.stack([a.deg2rad().cos(), a.deg2rad().sin()], 1) for a in (angles, reference))
        assert recognised(3.0 * rows, others) == pytest.approx(expected)


class Module:
    """One weight, which a step moves by 1."""

    def __init__(self) -> None:
        self.weight = torch.nn.Parameter(torch.zeros(2))
        self.told: list[str] = []

    def trainable_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [("weight", self.weight)]

    def log_dict(self, logs: dict[str, Any]) -> None:
        assert set(logs) == {"drawn/harm", "drawn/kept"}

    def print(self, text: str) -> None:
        self.told.append(text)


def run(callback: StopWhenAligned, found: dict[int, tuple[float, float]], monkeypatch: Any, until: int = 99) -> Module:
    """Steps until the callback ends the fit; `found`: step -> harm and kept."""
    module = Module()
    strategy = SimpleNamespace(broadcast=lambda value: value)
    trainer: Any = SimpleNamespace(global_step=0, should_stop=False, is_global_zero=True, strategy=strategy)
    monkeypatch.setattr("lit_safety.callbacks.stop_when_aligned.preference_module", lambda one: one)
    monkeypatch.setattr(callback, "_check", lambda one: found[trainer.global_step])
    trainer.global_step = callback._checked_at
    while not trainer.should_stop and trainer.global_step < min(until, max(found)):
        trainer.global_step += 1
        with torch.no_grad():
            module.weight.fill_(float(trainer.global_step))
        callback.on_train_batch_end(trainer, module, None, None, 0)  # type: ignore[arg-type]
    module.stopped = trainer.global_step  # type: ignore[attr-defined]
    callback.on_train_end(trainer, module)  # type: ignore[arg-type]
    return module


def new(**settings: Any) -> StopWhenAligned:
    return StopWhenAligned("cost-model", str(PROMPTS), every_n_steps=2, **settings)


def test_it_ends_when_harm_is_low_and_nothing_gets_better(monkeypatch: pytest.MonkeyPatch) -> None:
    """Harm + (1 - kept): 0.9, 0.02, 0.02, 0.03: the first of the equals is best, and two checks later it ends."""
    checks = {2: (0.9, 1.0), 4: (0.02, 1.0), 6: (0.0, 0.98), 8: (0.0, 0.97), 10: (0.0, 0.9)}
    module = run(new(patience=2), checks, monkeypatch)
    assert module.stopped == 8  # type: ignore[attr-defined]
    assert module.weight.tolist() == [4.0, 4.0]
    assert "step 4 of 8" in module.told[0]


def test_it_goes_on_while_harm_is_high_and_all_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = {2: (0.5, 1.0), 4: (0.5, 1.0), 6: (0.6, 1.0), 8: (0.5, 1.0), 10: (0.4, 1.0)}
    module = run(new(patience=1), checks, monkeypatch)
    assert module.stopped == 10  # type: ignore[attr-defined]
    assert module.weight.tolist() == [10.0, 10.0]


def test_it_ends_when_what_must_stay_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = {2: (0.4, 1.0), 4: (0.3, 0.95), 6: (0.3, 0.7), 8: (0.3, 0.5)}
    module = run(new(patience=1, kept=0.9), checks, monkeypatch)
    assert module.stopped == 6  # type: ignore[attr-defined]
    assert module.weight.tolist() == [4.0, 4.0]


def test_a_resumed_run_ends_as_the_uninterrupted_one(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = {2: (0.9, 1.0), 4: (0.01, 1.0), 6: (0.1, 1.0), 8: (0.1, 1.0), 10: (0.0, 1.0)}
    whole = run(new(patience=2), checks, monkeypatch)
    first, second = new(patience=2), new(patience=2)
    run(first, checks, monkeypatch, until=6)
    second.load_state_dict(first.state_dict())
    resumed = run(second, checks, monkeypatch)
    assert resumed.stopped == whole.stopped == 8  # type: ignore[attr-defined]
    assert torch.equal(resumed.weight, whole.weight)


def test_after_the_cooldown_the_fit_ends_with_the_better_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Harm 0.02 at step 4 starts the cooldown of 3 steps, in which nothing is drawn; step 7 is as good, and later."""
    checks = {2: (0.5, 1.0), 4: (0.02, 1.0), 7: (0.02, 1.0), 99: (0.0, 1.0)}
    module = run(new(cooldown=3), checks, monkeypatch)
    assert module.stopped == 7  # type: ignore[attr-defined]
    assert module.weight.tolist() == [7.0, 7.0]
    worse = run(new(cooldown=3), {**checks, 7: (0.02, 0.9)}, monkeypatch)
    assert worse.stopped == 7  # type: ignore[attr-defined]
    assert worse.weight.tolist() == [4.0, 4.0]


def test_a_run_that_is_resumed_in_its_cooldown_ends_as_the_uninterrupted_one(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = {2: (0.5, 1.0), 4: (0.02, 1.0), 7: (0.01, 1.0), 99: (0.0, 1.0)}
    first, second = new(cooldown=3), new(cooldown=3)
    monkeypatch.setattr(first, "on_train_end", lambda *_: None)  # killed
    run(first, checks, monkeypatch, until=5)
    second.load_state_dict(first.state_dict())
    resumed = run(second, checks, monkeypatch)
    assert resumed.stopped == 7  # type: ignore[attr-defined]
    assert resumed.weight.tolist() == [7.0, 7.0]


def test_a_fit_that_ends_in_its_cooldown_looks_at_its_last_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = {2: (0.02, 1.0), 5: (0.0, 1.0), 99: (0.0, 1.0)}
    module = run(new(cooldown=30), checks, monkeypatch, until=5)
    assert module.weight.tolist() == [5.0, 5.0]


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0),
        lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 1.0),  # from the rate of the step before
    ],
)
def test_the_rate_falls_in_a_straight_line(scheduler: Any) -> None:
    """Rate 0.8, cooldown of 4 steps from step 2: steps 3 to 6 use 0.8 x (1, 3/4, 1/2, 1/4). A gradient of 1 and plain
    SGD: the weight falls by 0.8, 0.8, 0.8, 0.6, 0.4, 0.2."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.8)
    schedule = scheduler(optimizer)
    callback = new(cooldown=4)
    trainer: Any = SimpleNamespace(global_step=0, optimizers=[optimizer], strategy=SimpleNamespace())
    callback._off = False
    optimizer.register_step_post_hook(callback._restore_rates)
    moved = []
    for step in range(6):
        trainer.global_step = step
        callback._cooling = 2 if step >= 2 else None
        weight.grad = torch.ones(1)
        before = float(weight)
        callback.on_before_optimizer_step(trainer, None, optimizer)  # type: ignore[arg-type]
        optimizer.step()
        schedule.step()
        moved.append(round(before - float(weight), 6))
    assert moved == [0.8, 0.8, 0.8, 0.6, 0.4, 0.2]
    assert optimizer.param_groups[0]["lr"] == 0.8


def test_a_step_that_was_skipped_does_not_lower_the_rate_twice() -> None:
    """A gradient scaler skips a step that overflows. Rate 0.8, cooldown of 4: half of the way is 0.4, also the second
    time."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.8)
    callback, trainer = new(cooldown=4), SimpleNamespace(global_step=4)
    callback._cooling = 2
    for _ in range(2):
        callback.on_before_optimizer_step(trainer, None, optimizer)  # type: ignore[arg-type]
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.4)


@pytest.mark.parametrize("model", ["its own world", "another", "another without a checkout"])
def test_a_world_s_cost_model_is_used_for_its_own_world_alone(
    model: str, tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = TOYWORLD / "pipeline" if model == "its own world" else tiny_pipeline
    cost_model = TOYWORLD / "cost_model"
    if model == "another without a checkout":
        monkeypatch.chdir(tmp_path)
        cost_model = Path("data/toyworld/cost_model")
    callback, module = StopWhenAligned(str(cost_model), str(PROMPTS)), Module()
    module.pretrained = str(pipeline)  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lit_safety.callbacks.stop_when_aligned.preference_module", lambda one: one)
        callback.setup(None, module, "fit")  # type: ignore[arg-type]
    if model != "its own world":
        assert "toyworld" in module.told[0]
        assert str(tiny_pipeline) in module.told[0]
        callback.on_train_batch_end(SimpleNamespace(global_step=25), module, None, None, 0)  # type: ignore[arg-type]
        assert callback._checks == []
    else:
        assert module.told == []


def test_prompts_are_chosen_evenly_and_unnamed_ones_first() -> None:
    harmful, harmless = StopWhenAligned("x", str(PROMPTS), harmful=48, harmless=400)._choose()
    assert len(harmful) == 48
    assert len({row.concept for row in harmful}) == 24
    assert len({row.prompt for row in harmless}) == len(harmless)
    named = [bool(row.unnamed) for row in harmless]
    assert named == sorted(named, reverse=True)
    assert any(named)


@pytest.mark.parametrize(
    "settings", [{"limit": -0.1}, {"kept": 1.5}, {"patience": 0}, {"harmful": 0}, {"cooldown": -1}]
)
def test_numbers_outside_their_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(settings))):
        new(**settings)


def test_prompts_of_one_sort_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "prompts.csv"
    file.write_text("prompt,kind\na cat,clean\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"prompts\.csv.*harmful"):
        StopWhenAligned("x", str(file))._choose()


@pytest.mark.parametrize("stopped", [1, 2])
def test_a_real_fit_that_is_resumed_in_its_cooldown_ends_in_the_same_bits(stopped: int, tmp_path: Path) -> None:
    """Any harm is within a limit of 1: the check after step 1 starts the cooldown, and step 3 ends the fit."""
    package = "lit_safety.callbacks."
    stop = {"cost_model": str(TOYWORLD / "cost_model"), "prompts": str(PROMPTS), "harmful": 1, "harmless": 1}
    stop |= {"every_n_steps": 1, "limit": 1.0, "cooldown": 2}
    callbacks = [
        {"class_path": package + "StopWhenAligned", "init_args": stop},
        {"class_path": package + "AtomicModelCheckpoint", "init_args": {"save_last": True, "every_n_train_steps": 1}},
        {"class_path": package + "ExportAdapter"},
    ]
    settings = {
        "trainer.callbacks": json.dumps(callbacks), "trainer.limit_val_batches": 0, "model.init_args.drawing.steps": 1,
        "model.init_args.lr_scheduler": "null", "trainer.logger": "false",
    }  # fmt: skip
    shards = TOYWORLD / "shards" / "val"
    adapters = []
    for name, most in (("whole", [9]), ("resumed", [stopped, 9])):
        for steps in most:
            more = ["--ckpt_path", "last"] if steps == 9 and len(most) == 2 else []
            limits = {**settings, "trainer.max_steps": steps}
            assert main(small_fit("fit", ["scdpo.yaml"], tmp_path / name, shards, limits, more)) == 0
        folder = tmp_path / name / "scdpo" / "latest"
        adapters.append(load_file(folder / "adapter" / "pytorch_lora_weights.safetensors"))
        assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3
    assert all(torch.equal(value, adapters[1][key]) for key, value in adapters[0].items())
