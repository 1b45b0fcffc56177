"""A fit that ends by what it draws, and leaves the best weights that it had."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lit_safety.callbacks import StopWhenAligned
from lit_safety.callbacks.stop_when_aligned import recognised
from lit_safety.core.errors import UserError
from tests.helpers.documents import TOYWORLD

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


def test_prompts_are_chosen_evenly_and_unnamed_ones_first() -> None:
    harmful, harmless = StopWhenAligned("x", str(PROMPTS), harmful=48, harmless=400)._choose()
    assert len(harmful) == 48
    assert len({row.concept for row in harmful}) == 24
    assert len({row.prompt for row in harmless}) == len(harmless)
    named = [bool(row.unnamed) for row in harmless]
    assert named == sorted(named, reverse=True)
    assert any(named)


@pytest.mark.parametrize("settings", [{"limit": -0.1}, {"kept": 1.5}, {"patience": 0}, {"harmful": 0}])
def test_numbers_outside_their_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(settings))):
        new(**settings)


def test_prompts_of_one_sort_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "prompts.csv"
    file.write_text("prompt,kind\na cat,clean\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"prompts\.csv.*harmful"):
        StopWhenAligned("x", str(file))._choose()
