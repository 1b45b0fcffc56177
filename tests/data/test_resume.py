"""A run cut at any step and resumed sees the rest of the stream and ends with the weights of the run that was
not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, OnExceptionCheckpoint

from lit_safety.core.errors import UserError
from lit_safety.data import PairBatch, PreferenceDataModule
from tests.helpers.pair_fits import Recorder, fit, make_trainer

STEP = 8  # pairs: batch 4 accumulated twice
EVERY_STEP = {"every_n_train_steps": 1}
EPOCH_END = {"every_n_epochs": 1, "save_on_train_epoch_end": True}
VALIDATION_END = {"every_n_epochs": 1, "save_on_train_epoch_end": False, "monitor": "val_loss"}
STEPS = {"max_steps": 12, "max_epochs": -1}  # five steps a pass: ends in the third
EPOCHS = {"max_epochs": 3}


def data(shards: Path, workers: int = 0, **options: Any) -> PreferenceDataModule:
    return PreferenceDataModule(str(shards), **{"batch_size": 4, "num_workers": workers, "flip": True, **options})


def assert_same_end(resumed: Recorder, whole: Recorder, step: int) -> None:
    assert resumed.stream == whole.stream[step * STEP :]
    assert torch.equal(resumed.weight, whole.weight)


@pytest.mark.parametrize("saved", [EVERY_STEP, EPOCH_END, VALIDATION_END], ids=["step", "epoch-end", "val-end"])
@pytest.mark.parametrize("until", [STEPS, EPOCHS], ids=["max_steps", "max_epochs"])
@pytest.mark.parametrize("validated", [False, True], ids=["no-val", "val"])
def test_resume_from_every_checkpoint(
    shards: Path, tmp_path: Path, saved: dict[str, Any], until: dict[str, Any], validated: bool
) -> None:
    if saved is VALIDATION_END and not validated:
        pytest.skip("nothing is saved at the end of a validation that is not run")
    options = {"val": str(shards)} if validated else {}

    def run(folder: Path, resume: Path | None = None) -> Recorder:
        trainer = make_trainer(folder, saved, accumulate_grad_batches=2, **until)
        return fit(trainer, data(shards, **options), resume)

    whole = run(tmp_path / "whole")
    assert len(whole.stream) == STEP * (12 if until is STEPS else 15)
    checkpoints = sorted((tmp_path / "whole").glob("*.ckpt"))
    assert len(checkpoints) >= 2
    for checkpoint in checkpoints:
        assert_same_end(run(tmp_path / checkpoint.stem, checkpoint), whole, int(checkpoint.stem))


@pytest.mark.parametrize("until", [STEPS, EPOCHS], ids=["max_steps", "max_epochs"])
def test_a_resumed_run_is_resumed(shards: Path, tmp_path: Path, until: dict[str, Any]) -> None:
    """After a resume at an epoch's end under `max_steps`, Lightning hands samplers an epoch that is too high."""
    saved = {"every_n_train_steps": 1, "save_on_train_epoch_end": True}

    def run(folder: Path, resume: Path | None = None) -> Recorder:
        return fit(make_trainer(folder, saved, accumulate_grad_batches=2, **until), data(shards), resume)

    whole = run(tmp_path / "0")
    fit(make_trainer(tmp_path / "1", EPOCH_END, accumulate_grad_batches=2, **until), data(shards))
    run(tmp_path / "2", tmp_path / "1" / "005.ckpt")
    assert_same_end(run(tmp_path / "3", tmp_path / "2" / "007.ckpt"), whole, 7)
    assert_same_end(run(tmp_path / "4", tmp_path / "3" / "009.ckpt"), whole, 9)


class SkipRest(Recorder):
    """Ends every pass after three batches, as Lightning lets a module do."""

    def on_train_batch_start(self, batch: PairBatch, batch_idx: int) -> int | None:
        return -1 if batch_idx == 3 else None


def test_a_pass_that_a_module_cut_short_is_over(shards: Path, tmp_path: Path) -> None:
    def run(folder: Path, resume: Path | None = None) -> Recorder:
        module = SkipRest()
        trainer = make_trainer(folder, EPOCH_END, max_epochs=3)
        trainer.fit(module, datamodule=data(shards), ckpt_path=resume)
        return module

    whole = run(tmp_path / "whole")
    assert len(set(whole.stream)) == 3 * 3 * 4
    resumed = run(tmp_path / "resumed", tmp_path / "whole" / "003.ckpt")
    assert resumed.stream == whole.stream[12:]
    assert torch.equal(resumed.weight, whole.weight)


@pytest.mark.parametrize("workers", [1, 2])
def test_resume_does_not_count_what_workers_have_ahead(shards: Path, tmp_path: Path, workers: int) -> None:
    def run(folder: Path, workers: int, resume: Path | None = None) -> Recorder:
        trainer = make_trainer(folder, EVERY_STEP, accumulate_grad_batches=2, **STEPS)
        return fit(trainer, data(shards, workers), resume)

    whole = run(tmp_path / "whole", workers)
    for step in (3, 5, 7):  # mid-pass, at a pass's end, in the second pass
        checkpoint = tmp_path / "whole" / f"{step:03d}.ckpt"
        assert_same_end(run(tmp_path / str(step), workers, checkpoint), whole, step)
    assert_same_end(run(tmp_path / "other", 0, tmp_path / "whole" / "003.ckpt"), whole, 3)


def test_resume_with_shortened_passes_and_validation_within_them(shards: Path, tmp_path: Path) -> None:
    options = {"limit_train_batches": 6, "val_check_interval": 2, "accumulate_grad_batches": 2, **STEPS}

    def run(folder: Path, resume: Path | None = None) -> Recorder:
        return fit(make_trainer(folder, EVERY_STEP, **options), data(shards, val=str(shards)), resume)

    whole = run(tmp_path / "whole")
    assert len({seed for _, seed in whole.stream}) == 12 * STEP  # a new pass after 3 steps, never the same again
    for step in (1, 3, 4, 6, 11):
        assert_same_end(run(tmp_path / str(step), tmp_path / "whole" / f"{step:03d}.ckpt"), whole, step)


class Interrupt(Callback):
    """Stops a run in the middle of a step, or after it."""

    def __init__(self, step: int, after: bool) -> None:
        self.step, self.after = step, after

    def on_before_optimizer_step(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and not self.after:
            raise KeyboardInterrupt

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and self.after:
            raise RuntimeError("pulled the plug")


@pytest.mark.parametrize("after", [False, True], ids=["within-the-step", "after-it"])
@pytest.mark.parametrize("step", [2, 10])  # ten steps are one pass
def test_a_batch_whose_step_did_not_end_is_trained_again(shards: Path, tmp_path: Path, step: int, after: bool) -> None:
    whole = fit(make_trainer(tmp_path, max_steps=13, max_epochs=-1), data(shards))
    rescue = OnExceptionCheckpoint(tmp_path, "rescue")
    with pytest.raises((RuntimeError, SystemExit)):
        fit(
            make_trainer(tmp_path, callbacks=[Interrupt(step, after), rescue], max_steps=13, max_epochs=-1),
            data(shards, workers=2),
        )
    resumed = fit(make_trainer(tmp_path, max_steps=13, max_epochs=-1), data(shards), tmp_path / "rescue.ckpt")
    assert resumed.stream == whole.stream[step * 4 :]
    assert torch.equal(resumed.weight, whole.weight)


def test_resume_in_the_middle_of_a_pass_over_other_data_is_refused(shards: Path, tmp_path: Path) -> None:
    fit(make_trainer(tmp_path, EVERY_STEP, max_steps=10, max_epochs=-1), data(shards))
    with pytest.raises(UserError, match=r"batch_size x ranks = 4, but now it is 5"):
        fit(make_trainer(tmp_path, max_steps=12), data(shards, batch_size=5), tmp_path / "003.ckpt")
    with pytest.raises(UserError, match=r"data\.init_args\.seed = 0, but now it is 1"):
        fit(make_trainer(tmp_path, max_steps=12), data(shards, seed=1), tmp_path / "003.ckpt")
    with pytest.raises(UserError, match=r"the fingerprint of data\.init_args\.train and its filters = "):
        fit(make_trainer(tmp_path, max_steps=12), data(shards, orders=["quality", "safety"]), tmp_path / "003.ckpt")
    # Between two passes nothing is cut in two.
    other = fit(make_trainer(tmp_path, max_steps=12), data(shards, batch_size=5), tmp_path / "010.ckpt")
    assert len(other.stream) == 10


def test_a_second_fit_of_the_same_datamodule_starts_again(shards: Path, tmp_path: Path) -> None:
    both = data(shards)
    first = fit(make_trainer(tmp_path, max_steps=3), both)
    assert fit(make_trainer(tmp_path, max_steps=3), both).stream == first.stream


def test_a_fit_that_is_prolonged_goes_on_where_it_was(shards: Path, tmp_path: Path) -> None:
    whole = fit(make_trainer(tmp_path, max_epochs=2), data(shards))
    trainer, module, both = make_trainer(tmp_path, max_epochs=1), Recorder(), data(shards)
    trainer.fit(module, datamodule=both)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, datamodule=both)
    assert module.stream == whole.stream
