"""Several sources in given proportions: exact shares, nothing lost, the same on any number of ranks, exact resume."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_safety.core.errors import UserError
from lit_safety.data import PreferenceDataModule
from lit_safety.data.reading.order import Deal, Group, MixedPlan, shares, taken
from lit_safety.data.reading.select import Selection
from tests.helpers.pair_fits import Recorder, fit, make_trainer
from tests.helpers.pair_shards import write_shards


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """30 pairs in 5 shards, numbers from 0; 10 in 3 shards, numbers from 100."""
    folder = tmp_path_factory.mktemp("two")
    write_shards(folder / "large", 30, 6)
    write_shards(folder / "small", 10, 4, first=100)
    return [str(folder / "large"), str(folder / "small")]


def test_shares_are_in_proportion_and_add_up() -> None:
    """8 by [2, 1]: 5.33 and 2.67; the largest remainder gets the one that is left: 5 and 3."""
    assert shares([2, 1], 8) == [5, 3]
    assert shares([1, 1, 1], 10) == [4, 3, 3]  # ties: the first
    assert shares([0.5, 0.25, 0.25], 40) == [20, 10, 10]
    assert shares([1000, 1], 8) == [8, 0]


@pytest.mark.parametrize("each", [[5, 3], [1, 1, 1], [97, 2, 1], [0, 4]])
def test_a_pass_is_spread_evenly_and_exact_at_its_end(each: list[int]) -> None:
    total = sum(each)
    before = [0] * len(each)
    for position in range(1, total + 1):
        now = taken(each, position)
        assert sum(now) == position
        assert all(0 <= b - a <= 1 for a, b in zip(before, now, strict=True))
        assert all(abs(n - position * share / total) < len(each) for n, share in zip(now, each, strict=True))
        before = now
    assert before == each


def plan(deal: Deal, epoch: int = 0) -> MixedPlan:
    groups = [Group(Selection((6, 6, 6, 6, 6, 0, 0, 0), None)), Group(Selection((0, 0, 0, 0, 0, 4, 4, 2), None))]
    return MixedPlan(groups, [1, 1], deal, seed=3, epoch=epoch, window=2)


def samples(one: MixedPlan, batch: int) -> list[tuple[int, int, int, int]]:
    """(source, own pass, shard, number) of each sample of a batch."""
    found = []
    for draw in one.draws(batch):
        order = one.order(draw)
        for position in range(draw.start, draw.stop):
            window = order.window_at(position)
            shard, number = order.samples(window)[position - window.start].tolist()
            found.append((draw.group, draw.epoch, shard, number))
    return found


def test_each_source_goes_round_by_itself_and_nothing_is_left_out() -> None:
    """40 pairs, half of each: three passes take 60 of the 30 (two rounds) and 60 of the 10 (six rounds)."""
    seen: Counter[tuple[int, int, int, int]] = Counter()
    for epoch in range(3):
        one = plan(Deal(4), epoch)
        assert one.batches == 10
        for batch in range(one.batches):
            found = samples(one, batch)
            assert Counter(source for source, *_ in found) == {0: 2, 1: 2}
            seen.update(found)
    assert set(seen.values()) == {1}
    assert Counter((source, own) for source, own, *_ in seen) == {
        **{(0, own): 30 for own in range(2)},
        **{(1, own): 10 for own in range(6)},
    }


def test_windows_are_of_shards_that_hold_something() -> None:
    one = plan(Deal(4))
    (draw, *_) = one.draws(0)
    assert [len(window.shards) for window in one.order(draw).windows] == [2, 2, 1]


def test_batch_8_is_4_accumulated_twice_is_two_ranks_of_4() -> None:
    for epoch in range(2):
        whole = plan(Deal(8), epoch)
        twice = plan(Deal(4, accumulate=2), epoch)
        ranks = [plan(Deal(4, rank, 2), epoch) for rank in range(2)]
        for step in range(whole.batches):
            expected = sorted(samples(whole, step))
            assert sorted(samples(twice, 2 * step) + samples(twice, 2 * step + 1)) == expected
            assert sorted(samples(ranks[0], step) + samples(ranks[1], step)) == expected


def data(two: list[str], workers: int = 0, **options: Any) -> PreferenceDataModule:
    given = {"weights": [1.0, 1.0], "batch_size": 4, "flip": True, **options}
    return PreferenceDataModule(two, num_workers=workers, **given)


def test_the_stream_is_the_plan_and_a_repeated_pair_has_other_chances(two: list[str]) -> None:
    module = data(two)
    module.setup()
    loader = module.train_dataloader()
    seeds: dict[str, set[int]] = {}
    for _ in range(3):
        for batch in loader:
            assert sum(int(key) >= 100 for key in batch.keys) == 2
            for key, seed in zip(batch.keys, batch.seeds, strict=True):
                assert seed not in seeds.setdefault(key, set())
                seeds[key].add(seed)
    assert {len(found) for key, found in seeds.items() if int(key) < 100} == {2}
    assert {len(found) for key, found in seeds.items() if int(key) >= 100} == {6}


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_exact_in_a_pass_at_its_end_and_in_the_next(two: list[str], tmp_path: Path, workers: int) -> None:
    def run(folder: Path, resume: Path | None = None, own: int = workers) -> Recorder:
        saved = {"every_n_train_steps": 1}
        trainer = make_trainer(folder, saved, accumulate_grad_batches=2, max_steps=9, max_epochs=-1)
        return fit(trainer, data(two, own), resume)

    whole = run(tmp_path / "whole")
    for step in (3, 5, 7):  # five steps a pass
        resumed = run(tmp_path / str(step), tmp_path / "whole" / f"{step:03d}.ckpt", own=0)
        assert resumed.stream == whole.stream[step * 8 :]
        assert torch.equal(resumed.weight, whole.weight)
    trainer = make_trainer(tmp_path / "other", accumulate_grad_batches=2, max_steps=9, max_epochs=-1)
    with pytest.raises(UserError, match=r"weights .* = \[1\.0, 1\.0\] of \[30, 10\], but now it is \[2"):
        fit(trainer, data(two, weights=[2.0, 1.0]), tmp_path / "whole" / "003.ckpt")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"weights": [1.0]}, r"data\.init_args\.weights must hold a number above 0 for each entry .* has 2"),
        ({"weights": [1.0, 0.0]}, "must hold a number above 0"),
        ({"weights": [1.0, float("nan")]}, "must hold a number above 0"),
        ({"train": "somewhere"}, "which has none: it is no list"),
        ({"one_category": True}, "leave one of them out"),
    ],
)
def test_wrong_weights_are_named(two: list[str], options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        PreferenceDataModule(**{"train": two, "weights": [1.0, 1.0], **options})


def test_a_source_that_would_not_be_seen_is_an_error(two: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"weights\[1\] is 0\.01: .* pass of 40"):
        fit(make_trainer(tmp_path, max_steps=1), data(two, weights=[1.0, 0.01]))
    write_shards(tmp_path / "other", 3, 3, first=200)  # none of them is clean
    filtered = data([two[0], str(tmp_path / "other")], kinds=["clean"])
    with pytest.raises(UserError, match=r"train\[1\]: no sample is left after the filter"):
        fit(make_trainer(tmp_path, max_steps=1), filtered)
