"""A run whose chosen images get worse says so once and, if asked, ends with the best weights before that."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lit_safety.callbacks import WatchChosenError
from lit_safety.callbacks.watch_chosen import share_of
from lit_safety.core.errors import UserError

#: Of a validation after so many steps: mean of e_w - r_w, mean of e_w, loss.
Found = dict[int, tuple[float, float, float]]


class Module:
    """One weight, which a step moves by 1."""

    def __init__(self) -> None:
        self.weight = torch.nn.Parameter(torch.zeros(2))
        self.told: list[str] = []

    def trainable_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [("weight", self.weight)]

    def print(self, text: str) -> None:
        self.told.append(text)


@pytest.fixture(autouse=True)
def any_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_safety.callbacks.watch_chosen.preference_module", lambda one: one)


def run(
    callback: WatchChosenError, steps: list[tuple[float, float]], validations: Found, start: int = 0
) -> tuple[Module, int, list[str]]:
    """Steps `steps` (e_w - r_w and e_w of each), validated after some; the module, the last step, and what was said."""
    module = Module()
    with torch.no_grad():
        module.weight.fill_(float(start))
    metrics: dict[str, torch.Tensor] = {}
    trainer: Any = SimpleNamespace(
        global_step=start, should_stop=False, sanity_checking=False, callback_metrics=metrics, datamodule=None,
        strategy=SimpleNamespace(reduce=lambda value, reduce_op: value), state=SimpleNamespace(fn="fit"),
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        callback.on_train_start(trainer, module)  # type: ignore[arg-type]
        for delta, error in steps[start:]:
            if trainer.should_stop:
                break
            trainer.global_step += 1
            with torch.no_grad():
                module.weight.fill_(float(trainer.global_step))
            metrics |= {"delta/chosen": torch.tensor(delta), "error/chosen": torch.tensor(error)}
            callback.on_train_batch_end(trainer, module, None, None, 0)  # type: ignore[arg-type]
            if trainer.global_step in validations:
                delta, error, loss = validations[trainer.global_step]
                metrics |= {"val/delta/chosen": torch.tensor(delta), "val/error/chosen": torch.tensor(error)}
                metrics["val/loss"] = torch.tensor(loss)
                callback.on_validation_end(trainer, module)  # type: ignore[arg-type]
        callback.on_train_end(trainer, module)  # type: ignore[arg-type]
    return module, trainer.global_step, [str(one.message) for one in said]


def test_the_share_by_hand() -> None:
    """e_w 0.23 and e_w - r_w 0.03: r_w is 0.2, and 0.03 / 0.2 = 0.15."""
    assert share_of(torch.tensor([0.03, 0.23], dtype=torch.float64)) == pytest.approx(0.15)


def test_it_says_once_what_to_set() -> None:
    """Means of 2 steps: (0 + 0.01) / 2 over 0.2 is 2.5%, below the limit of 5%; (0.03 + 0.03) / 2 over 0.2 is 15%."""
    steps = [(0.0, 0.2), (0.01, 0.21), (0.03, 0.23), (0.03, 0.23), (0.05, 0.25), (0.05, 0.25)]
    _, last, said = run(WatchChosenError(every_n_steps=2), steps, {})
    assert last == 6
    (line,) = said
    assert "step 4" in line
    assert "15.0%" in line
    assert "model.init_args.stability.winner_limit" in line


def test_a_run_within_the_limit_says_nothing() -> None:
    within = (0.008, 0.208)
    callback = WatchChosenError(every_n_steps=1, stop=True)
    module, last, said = run(callback, [within] * 4, {4: (*within, 0.5)})
    assert (last, said, module.told) == (4, [], [])
    assert module.weight.tolist() == [4.0, 4.0]


def test_what_was_found_lies_in_a_file(tmp_path: Path) -> None:
    """Training means of 2 steps, 0.01 over 0.2 and 0.03 over 0.2; validations 0.02 and 0.01 over 0.2."""
    callback = WatchChosenError(every_n_steps=2, limit=1.0)
    run(callback, [(0.01, 0.21)] * 2 + [(0.03, 0.23)] * 2, {2: (0.02, 0.22, 0.5), 4: (0.01, 0.21, 0.5)})
    trainer: Any = SimpleNamespace(is_global_zero=True, default_root_dir=str(tmp_path))
    callback.on_fit_end(trainer, Module())  # type: ignore[arg-type]
    found = json.loads((tmp_path / "chosen_error.json").read_text())
    assert found["train"] == [[2, pytest.approx(0.05)], [4, pytest.approx(0.15)]]
    assert found["val"] == [[2, pytest.approx(0.1)], [4, pytest.approx(0.05)]]
    assert (found["last"], found["highest"]) == (pytest.approx(0.05), pytest.approx(0.1))


def test_told_to_stop_it_ends_at_the_lowest_loss_before() -> None:
    """Validations after 2, 4, 6, 8 steps with losses 0.6, 0.4, 0.5, 0.3; the last is 10% above, so step 4 is the
    best."""
    validations = {2: (0.0, 0.2, 0.6), 4: (0.0, 0.2, 0.4), 6: (0.0, 0.2, 0.5), 8: (0.02, 0.22, 0.3)}
    module, last, said = run(WatchChosenError(every_n_steps=99, stop=True), [(0.0, 0.2)] * 12, validations)
    assert last == 8
    assert len(said) == 1
    assert module.weight.tolist() == [4.0, 4.0]
    assert "step 4 of 8" in module.told[0]


def test_with_no_validation_before_it_ends_at_the_weights_that_it_began_with() -> None:
    module, last, _ = run(WatchChosenError(stop=True), [(0.0, 0.2)] * 4, {2: (0.1, 0.3, 0.3)})
    assert last == 2
    assert module.weight.tolist() == [0.0, 0.0]


def test_a_resumed_run_ends_as_the_uninterrupted_one() -> None:
    validations = {2: (0.0, 0.2, 0.6), 4: (0.0, 0.2, 0.5), 6: (0.02, 0.22, 0.3)}
    steps = [(0.002 * number, 0.2 + 0.002 * number) for number in range(8)]
    whole, ended, said = run(WatchChosenError(every_n_steps=4, limit=0.06, stop=True), steps, validations)
    first, second = (WatchChosenError(every_n_steps=4, limit=0.06, stop=True) for _ in range(2))
    run(first, steps[:3], validations)
    second.load_state_dict(first.state_dict())
    resumed, last, said_later = run(second, steps, validations, start=3)
    assert last == ended == 6
    assert torch.equal(resumed.weight, whole.weight)
    assert said_later == said


@pytest.mark.parametrize("settings", [{"limit": -0.1}, {"limit": float("nan")}, {"every_n_steps": 0}])
def test_numbers_outside_their_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(settings))):
        WatchChosenError(**settings)
