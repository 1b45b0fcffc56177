from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser

from lit_safety.core.errors import UserError
from lit_safety.data import PreferenceDataModule
from tests.helpers.pair_fits import fit, make_trainer


@pytest.mark.parametrize(
    ("options", "stage", "complaint"),
    [
        (
            {"num_workers": 7},
            "fit",
            "data.init_args.num_workers is 7 but data.init_args.train has only 6 shards; lower it to 6",
        ),
        ({"train": None}, "fit", "data.init_args.train is not given"),
        ({}, "validate", "data.init_args.val is not given"),
        ({}, "test", "data.init_args.test is not given; name a folder of shards to test on"),
        ({}, "predict", "data.init_args.test is not given; name a folder of shards to predict on"),
        ({"val": "none"}, "fit", "data.init_args.val: none does not exist"),
        ({"test": "none"}, "test", "data.init_args.test: none does not exist"),
        ({"categories": ["propaganda"]}, "fit", "no sample is left after the filter"),
    ],
)
def test_what_can_be_known_is_said_before_anything_is_read(
    shards: Path, options: dict[str, Any], stage: str, complaint: str
) -> None:
    data = PreferenceDataModule(**{"train": str(shards), **options})
    with pytest.raises(UserError) as caught:
        data.check_sources(stage)
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"batch_size": 0}, "data.init_args.batch_size must be at least 1, not 0"),
        ({"val_batch_size": 0}, "data.init_args.val_batch_size must be at least 1"),
        ({"bad_sample_limit": -1}, "data.init_args.bad_sample_limit must be at least 0"),
        ({"num_workers": -1}, "data.init_args.num_workers must be at least 0"),
        ({"shuffle_window": 0}, "data.init_args.shuffle_window must be at least 1"),
        ({"resolution": 0}, "data.init_args.resolution must be at least 1 pixel"),
        ({"on_bad_sample": "ignore"}, "data.init_args.on_bad_sample must be error or skip"),
        ({"kinds": ["bad"]}, "data.init_args.kinds holds 'bad'"),
    ],
)
def test_wrong_numbers_are_named_by_their_key(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError) as caught:
        PreferenceDataModule("anywhere", **options)
    assert complaint in str(caught.value)


def test_too_few_pairs_for_one_step(shards: Path, tmp_path: Path) -> None:
    data = PreferenceDataModule(str(shards), batch_size=30)
    with pytest.raises(UserError, match=r"data\.init_args\.train has 40 pairs.* 30 .*batch_size.* 1 \(ranks\) x 2"):
        fit(make_trainer(tmp_path, accumulate_grad_batches=2, max_steps=1), data)


def test_a_step_that_would_be_smaller_than_the_others_is_left_out(shards: Path, tmp_path: Path) -> None:
    """40 pairs by 3 x 4: three steps of 12; the thirteenth batch would make a step of its own."""
    trainer = make_trainer(tmp_path, accumulate_grad_batches=4, max_epochs=2)
    module = fit(trainer, PreferenceDataModule(str(shards), batch_size=3))
    assert trainer.num_training_batches == 12
    assert trainer.global_step == 6
    assert len(module.stream) == 72


def test_overfitting_repeats_the_same_batches(shards: Path, tmp_path: Path) -> None:
    data = PreferenceDataModule(str(shards), batch_size=4, flip=True)
    module = fit(make_trainer(tmp_path, overfit_batches=2, max_epochs=3), data)
    assert module.stream == module.stream[:8] * 3


def test_filters_apply_to_every_stage(shards: Path) -> None:
    """Clean and about hate are the numbers 11, 23 and 35."""
    given = str(shards)
    data = PreferenceDataModule(given, given, given, batch_size=2, categories=["hate"], kinds=["clean"])
    data.setup()
    for batches in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        assert [batch.keys for batch in batches] == [["00011", "00023"], ["00035"]]
    (only,) = data.train_dataloader()
    assert set(only.keys) < {"00011", "00023", "00035"}


def test_batches_move_as_one(shards: Path) -> None:
    data = PreferenceDataModule(str(shards), batch_size=2)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    moved = batch.to("meta")
    assert {
        moved.chosen.device.type,
        moved.rejected.device.type,
        moved.harmful.device.type,
        moved.cost.device.type,
    } == {"meta"}
    assert (moved.keys, len(moved)) == (batch.keys, 2)
    assert batch.chosen.device == torch.device("cpu")


def test_every_argument_is_explained_in_help() -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(PreferenceDataModule, "data")
    text = parser.format_help()
    for action in parser._actions:
        if action.dest.startswith("data.") and action.dest != "data.config":
            assert action.help, f"{action.dest} has no help"
    assert "Mirror half of the training pairs" in text
