from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lit_safety.core.errors import UserError
from lit_safety.data import PairBatch, PreferenceDataModule
from lit_safety.data.reading.order import Deal, Group, Plan, batches_in
from lit_safety.data.reading.select import Selection
from tests.helpers.pair_fits import Recorder, fit, make_trainer
from tests.helpers.pair_shards import sample, write_tar


def group(name: str, *counts: int) -> Group:
    return Group(Selection(counts, tuple(np.arange(count) for count in counts)), name)


GROUPS = [group("hate", 9, 11), group("sexual", 3, 0), group("violence", 30, 3)]  # 2, 0 and 4 steps of 8


@pytest.mark.parametrize(("world", "batch_size", "accumulate"), [(1, 8, 1), (1, 4, 2), (2, 4, 1), (2, 2, 2)])
def test_a_step_is_of_one_group_on_every_rank(world: int, batch_size: int, accumulate: int) -> None:
    deals = [Deal(batch_size, rank, world, accumulate) for rank in range(world)]
    assert {batches_in(GROUPS, deal) for deal in deals} == {6 * accumulate}
    plans = [Plan(GROUPS, deal, seed=1, epoch=2, window=2) for deal in deals]
    seen = []
    for step in range(6):
        draws = [plan.draw(step * accumulate + micro) for plan in plans for micro in range(accumulate)]
        (turn,) = {draw.group for draw in draws}
        positions = sorted(position for draw in draws for position in range(draw.start, draw.stop))
        assert positions == list(range(positions[0], positions[0] + 8))
        seen.append((turn, positions[0]))
    # The same steps for every way to deal, each group's pairs in their order and none twice.
    whole = Plan(GROUPS, Deal(8), seed=1, epoch=2, window=2)
    assert seen == [(whole.draw(step).group, whole.draw(step).start) for step in range(6)]
    assert Counter(turn for turn, _ in seen) == {0: 2, 2: 4}
    assert sorted(seen) == [(0, 0), (0, 8), (2, 0), (2, 8), (2, 16), (2, 24)]


def test_turns_are_mixed_and_change_with_the_pass() -> None:
    many = [group("hate", 400), group("violence", 400)]
    turns = [[Plan(many, Deal(8), 0, epoch, 4).draw(step).group for step in range(100)] for epoch in range(2)]
    assert turns[0] != turns[1]
    changes = sum(a != b for a, b in zip(turns[0], turns[0][1:], strict=False))
    assert 30 < changes < 70  # about every second time


class Categories(Recorder):
    """Notes which category each batch is of, and that its pairs are."""

    def __init__(self) -> None:
        super().__init__()
        self.turns: list[str] = []

    def training_step(self, batch: PairBatch, batch_idx: int) -> torch.Tensor:
        assert batch.category is not None
        assert all(batch.category in categories for categories in batch.categories)
        self.turns.append(batch.category)
        return super().training_step(batch, batch_idx)


def run(
    shards: Path, folder: Path, batch_size: int, accumulate: int, workers: int, resume: Path | None = None
) -> Categories:
    data = PreferenceDataModule(str(shards), batch_size=batch_size, num_workers=workers, one_category=True)
    module = Categories()
    options = {"accumulate_grad_batches": accumulate, "max_steps": 14, "max_epochs": -1}
    trainer = make_trainer(folder, {"every_n_train_steps": 1}, **options)
    trainer.fit(module, datamodule=data, ckpt_path=resume)
    return module


def test_a_fit_by_categories_resumes_exactly_and_accumulates_alike(shards: Path, tmp_path: Path) -> None:
    """Of 13 or 14 pairs each category gives three steps of 4: nine a pass."""
    whole = run(shards, tmp_path / "whole", 4, 1, workers=0)
    assert Counter(whole.turns[:9]) == {"hate": 3, "sexual": 3, "violence": 3}
    assert len({key for key, _ in whole.stream[:36]}) == 36
    halves = run(shards, tmp_path / "halves", 2, 2, workers=2)
    assert halves.turns == [turn for turn in whole.turns for _ in range(2)]
    assert halves.stream == whole.stream
    for step in (4, 9, 11):
        resumed = run(shards, tmp_path / str(step), 2, 2, 1, tmp_path / "halves" / f"{step:03d}.ckpt")
        assert resumed.stream == halves.stream[step * 4 :]
        assert torch.equal(resumed.weight, halves.weight)


def test_a_pair_of_two_categories_takes_both_turns(tmp_path: Path) -> None:
    both = sample(0)["json"].replace(b'["violence"]', b'["violence", "hate"]')
    write_tar(tmp_path / "a.tar", [("both", sample(0, json=both)), ("hate", sample(2)), ("violence", sample(3))])
    data = PreferenceDataModule(str(tmp_path), batch_size=2, one_category=True)
    data.setup()
    found = {batch.category: set(batch.keys) for batch in data.train_dataloader()}
    assert found == {"hate": {"both", "hate"}, "violence": {"both", "violence"}}


def test_pairs_of_no_category_take_every_turn_where_they_are_asked_for(tmp_path: Path) -> None:
    """In training only, and without making an expert of a category that has no pair of its own."""
    free = sample(1)["json"].replace(b'["sexual"]', b"[]")
    write_tar(tmp_path / "a.tar", [("free", sample(1, json=free)), ("hate", sample(2)), ("violence", sample(3))])

    def data(**settings: Any) -> PreferenceDataModule:
        given = {"train": str(tmp_path), "val": str(tmp_path), "val_batch_size": 1, "one_category": True}
        return PreferenceDataModule(**{**given, **settings})

    shared = data(batch_size=2, uncategorised=True)
    assert shared.training_categories() == ["hate", "violence"]
    shared.setup()
    found = {batch.category: set(batch.keys) for batch in shared.train_dataloader()}
    assert found == {"hate": {"free", "hate"}, "violence": {"free", "violence"}}
    assert {batch.category: batch.keys for batch in shared.val_dataloader()} == {
        "hate": ["hate"], "violence": ["violence"],
    }  # fmt: skip
    alone = data(batch_size=2, uncategorised=True, categories=["hate"])
    alone.setup()
    assert {batch.category: set(batch.keys) for batch in alone.train_dataloader()} == {"hate": {"free", "hate"}}
    own = data(batch_size=1)
    own.setup()
    assert {key for batch in own.train_dataloader() for key in batch.keys} == {"hate", "violence"}
    mixed = data(batch_size=2, one_category=False, categories=["hate"], uncategorised=True)
    mixed.setup()
    (batch,) = mixed.train_dataloader()
    assert (batch.category, set(batch.keys)) == (None, {"free", "hate"})


def test_categories_too_small_for_a_step_are_named(shards: Path, tmp_path: Path) -> None:
    def data(size: int) -> PreferenceDataModule:
        return PreferenceDataModule(str(shards), batch_size=size, one_category=True)

    with pytest.warns(UserWarning, match="the 13 pairs of hate are too few for a step"):
        fit(make_trainer(tmp_path, max_steps=1), data(14))
    with (
        pytest.warns(UserWarning, match="too few for a step"),
        pytest.raises(UserError, match=r"has 40 pairs, but each category .* 15"),
    ):
        fit(make_trainer(tmp_path, max_steps=1), data(15))


def test_one_category_after_the_other_gives_each_what_it_would_get_alone(shards: Path, tmp_path: Path) -> None:
    """Seven steps of 4 a category are two whole passes of its pairs and a third begun: samples and their chance."""
    options = {"max_steps": 21, "max_epochs": -1, "accumulate_grad_batches": 2}

    def stream(folder: str, steps: int, resume: Path | None = None, **settings: Any) -> Categories:
        data = PreferenceDataModule(str(shards), batch_size=2, one_category=True, **settings)
        module = Categories()
        trainer = make_trainer(tmp_path / folder, {"every_n_train_steps": 1}, **options | {"max_steps": steps})
        trainer.fit(module, datamodule=data, ckpt_path=resume)
        return module

    whole = stream("whole", 21, consecutive=True)
    assert whole.turns == [name for name in ("hate", "violence", "sexual") for _ in range(14)]
    for place, name in enumerate(("hate", "violence", "sexual")):
        assert stream(name, 7, categories=[name]).stream == whole.stream[place * 28 : (place + 1) * 28]
    resumed = stream("resumed", 21, tmp_path / "whole" / "010.ckpt", num_workers=2, consecutive=True)
    assert resumed.stream == whole.stream[40:]
    with pytest.raises(UserError, match="the steps of one category = 7, but now it is 8"):
        stream("longer", 24, tmp_path / "whole" / "010.ckpt", consecutive=True)


@pytest.mark.parametrize("world", [1, 2])
def test_evaluation_is_one_category_after_the_other_and_loses_no_pair(shards: Path, world: int) -> None:
    deals = [Deal(4, rank, world, ragged=True) for rank in range(world)]
    plans = [Plan(GROUPS, deal, seed=None, epoch=0, window=1) for deal in deals]
    turns = [[plan.draw(number).group for number in range(plan.batches)] for plan in plans]
    assert all(turn == sorted(turn) for turn in turns)
    assert all(turn == turns[0] for turn in turns)
    draws = {plan.draw(number) for plan in plans for number in range(plan.batches)}
    for number, total in enumerate((20, 3, 33)):
        seen = [place for one in draws if one.group == number for place in range(one.start, one.stop)]
        assert sorted(seen) == list(range(total))


def test_validation_batches_are_of_one_category(shards: Path) -> None:
    data = PreferenceDataModule(str(shards), val=str(shards), val_batch_size=5, one_category=True)
    batches = list(data.val_dataloader())
    assert [batch.category for batch in batches] == ["hate"] * 3 + ["violence"] * 3 + ["sexual"] * 3
    assert len({key for batch in batches for key in batch.keys}) == sum(len(batch) for batch in batches) == 40
