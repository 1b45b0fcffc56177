"""Worker processes that live longer than a pass: the same batches, no new processes, none left at the end."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from lit_safety.core.errors import UserError
from lit_safety.data import PairBatch, PreferenceDataModule
from lit_safety.data.reading.batch import to_floats
from lit_safety.data.reading.loader import PairLoader
from tests.helpers.pair_fits import fit, make_trainer
from tests.helpers.pair_shards import sample, write_tar

Content = list[tuple[list[str], list[int], list[int]]]


def loader(folder: Path, workers: int, **options: object) -> PairLoader:
    data = PreferenceDataModule(str(folder), batch_size=4, num_workers=workers, flip=True, **options)  # type: ignore
    data.setup()
    return data.train_dataloader()


def content(batches: Iterable[PairBatch]) -> Content:
    return [(one.keys, one.seeds, one.chosen.flatten().tolist()) for one in batches if one.chosen is not None]


def processes() -> set[int | None]:
    return {one.pid for one in multiprocessing.active_children()}


def test_each_pass_is_the_next_one_by_the_same_processes(shards: Path):
    before = processes()
    with_workers, alone = loader(shards, 2), loader(shards, 0)
    seen = []
    for _ in range(3):
        assert content(with_workers) == content(alone)
        seen.append(processes() - before)
    assert len(seen[0]) == 2
    assert seen[1:] == [seen[0]] * 2
    with_workers.close()
    assert processes() == before
    assert content(with_workers) == content(alone), "a further pass starts others"
    del with_workers
    assert processes() == before


def test_a_pass_that_is_left_early_leaves_nothing_for_the_next(shards: Path):
    before = processes()
    with_workers, alone = loader(shards, 2), loader(shards, 0)
    for one in (with_workers, alone):
        batches = iter(one)
        next(batches)
        batches.close()  # type: ignore[attr-defined]
    kept = processes() - before
    assert content(with_workers) == content(alone)
    assert processes() - before == kept
    with_workers.close()


def test_two_passes_at_once_have_workers_of_their_own(shards: Path):
    data = PreferenceDataModule(val=str(shards), val_batch_size=4, num_workers=1)
    data.setup("validate")
    both = data.val_dataloader()
    assert isinstance(both, PairLoader)
    pairs = list(zip(both, both, strict=True))
    assert [one.keys for one, _ in pairs] == [other.keys for _, other in pairs]
    assert len(pairs) == len(both)
    both.close()


def test_workers_end_with_a_bad_sample(tmp_path: Path):
    before = processes()
    write_tar(
        tmp_path / "shard-000000.tar",
        [("a", sample(0)), ("b", sample(1, json=b"{")), ("c", sample(2)), ("d", sample(3))],
    )
    broken = loader(tmp_path, 1)
    with pytest.raises(UserError, match="'b'"):
        list(broken)
    assert processes() == before


def test_a_fit_starts_its_workers_once_and_stops_them(shards: Path, tmp_path: Path):
    """Three passes of training and of validation: one process each."""
    before = processes()
    started: set[int | None] = set()

    class Watched(PreferenceDataModule):
        def on_after_batch_transfer(self, batch: PairBatch, dataloader_idx: int) -> PairBatch:
            started.update(processes() - before)
            return batch

    data = Watched(str(shards), str(shards), batch_size=4, num_workers=1)
    trainer = make_trainer(tmp_path, max_epochs=3)
    module = fit(trainer, data)
    assert trainer.current_epoch == 3
    assert len(started) == 2
    assert processes() == before
    alone = fit(make_trainer(tmp_path, max_epochs=3), PreferenceDataModule(str(shards), str(shards), batch_size=4))
    assert torch.equal(module.weight, alone.weight)
    assert module.stream == alone.stream


def test_numbers_of_torchs_own_generator_do_not_depend_on_workers(shards: Path):
    """What dropout draws in the second pass is what it draws where the training process reads."""
    found = []
    for workers in (0, 1):
        torch.manual_seed(0)
        one = loader(shards, workers)
        list(one)
        list(one)
        found.append(torch.rand(3))
        one.close()
    assert torch.equal(*found)


SPAWNED = """
import multiprocessing, sys
from lit_safety.data import PreferenceDataModule

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[2])
    loaders = []
    for workers in (1, 0):
        data = PreferenceDataModule(sys.argv[1], batch_size=4, num_workers=workers)
        data.setup()
        loaders.append(data.train_dataloader())
    seen = set()
    for _ in range(2):
        one, other = ([(b.keys, b.seeds, b.chosen.sum().item()) for b in each] for each in loaders)
        assert one == other
        seen |= {child.pid for child in multiprocessing.active_children()}
    assert len(seen) == 1, seen
    loaders[0].close()
    assert not multiprocessing.active_children()
    print("the same")
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_it_is_so_where_processes_do_not_begin_as_copies(method: str, shards: Path, tmp_path: Path):
    script = tmp_path / "passes.py"
    script.write_text(SPAWNED)
    root = str(Path(__file__).parents[3])
    done = subprocess.run(
        [sys.executable, str(script), str(shards), method],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "the same\n", done.stderr


def test_8_bits_become_the_numbers_that_they_stand_for():
    """0 -> -1, 51 -> 51 / 127.5 - 1 = -0.6, 255 -> 1; other types stay as they are."""
    levels = torch.arange(256, dtype=torch.uint8)
    found = to_floats(levels)
    assert found.dtype == torch.float32
    assert torch.equal(found, levels.float().div(127.5).sub(1.0))
    assert found[[0, 51, 255]].tolist() == pytest.approx([-1.0, -0.6, 1.0])
    assert to_floats(found) is found
    labels = torch.arange(3)
    assert to_floats(labels) is labels
