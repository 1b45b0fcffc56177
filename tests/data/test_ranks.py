"""Two ranks over gloo: the same steps as one rank, ranks in step over uneven shards, and an exact resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing import ProcessRaisedException

from lit_safety.data import PairBatch, PreferenceDataModule
from tests.helpers.pair_fits import Recorder, make_trainer
from tests.helpers.pair_shards import sample, write_shards, write_tar


class Reporter(Recorder):
    """Leaves its stream and weights in files: a forked rank's memory is lost."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.validated: list[str] = []

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.validated += batch.keys

    def on_fit_end(self) -> None:
        self.folder.mkdir(exist_ok=True)
        found = {"stream": self.stream, "weight": self.weight.detach().cpu(), "validated": self.validated}
        torch.save(found, self.folder / f"rank{self.global_rank}.pt")


def run(
    folder: Path,
    shards: Path,
    ranks: int,
    batch_size: int,
    accumulate: int = 1,
    resume: Path | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    trainer = make_trainer(
        folder,
        {"every_n_train_steps": 1},
        accumulate_grad_batches=accumulate,
        devices=ranks,
        strategy="ddp_fork" if ranks > 1 else "auto",
        max_steps=options.pop("max_steps", 6),
        max_epochs=-1,
    )
    data = PreferenceDataModule(str(shards), batch_size=batch_size, flip=True, **options)
    trainer.fit(Reporter(folder), datamodule=data, ckpt_path=resume)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(ranks)]


def steps(streams: list[list[Any]], size: int) -> list[set[Any]]:
    """What each step saw, all ranks together."""
    each = size // len(streams)
    return [
        {sample for stream in streams for sample in stream[at : at + each]} for at in range(0, len(streams[0]), each)
    ]


def test_batch_8_is_4_accumulated_twice_is_two_ranks_of_4(shards: Path, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", shards, ranks=1, batch_size=8)
    expected = steps([whole[0]["stream"]], 8)
    assert len(expected) == 6  # five steps are a pass
    for name, (ranks, batch_size, accumulate) in {
        "accumulated": (1, 4, 2),
        "ranks": (2, 4, 1),
        "both": (2, 2, 2),
    }.items():
        found = run(tmp_path / name, shards, ranks, batch_size, accumulate)
        assert steps([one["stream"] for one in found], 8) == expected, name
        for one in found:
            torch.testing.assert_close(one["weight"], whole[0]["weight"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("workers", [0, 2])
def test_two_ranks_resume_exactly(shards: Path, tmp_path: Path, workers: int) -> None:
    whole = run(tmp_path / "whole", shards, 2, 4, num_workers=workers, max_steps=8)
    for step in (3, 5):
        checkpoint = tmp_path / "whole" / f"{step:03d}.ckpt"
        resumed = run(tmp_path / str(step), shards, 2, 4, resume=checkpoint, num_workers=workers, max_steps=8)
        for rank in range(2):
            assert resumed[rank]["stream"] == whole[rank]["stream"][step * 4 :]
            assert torch.equal(resumed[rank]["weight"], whole[rank]["weight"])


def test_uneven_shards_keep_two_ranks_in_step(tmp_path: Path) -> None:
    write_shards(tmp_path / "train", 11, 5)  # 5, 5 and 1 pairs: dealt by the shard, ranks would get 6 and 5
    found = run(tmp_path / "run", tmp_path / "train", 2, 2, val=str(tmp_path / "train"), max_steps=4)
    first, second = (one["stream"] for one in found)
    assert len(first) == len(second) == 8
    assert len({key for key, _ in first[:4] + second[:4]}) == 8  # a pass of two steps: eight of the eleven, once
    # Two validations of 6 batches (2, 2, 2, 2, 2, 1), three a rank: every pair once in each.
    assert sorted(found[0]["validated"] + found[1]["validated"]) == sorted([f"{n:05d}" for n in range(11)] * 2)


def test_a_bad_sample_on_one_rank_leaves_both_in_step(tmp_path: Path) -> None:
    """If it is left out, the other rank does not wait. If it is an error, the run ends and does not hang."""
    good = [(f"{number}", sample(number)) for number in range(12)]
    write_tar(tmp_path / "train" / "a.tar", [*good[:5], ("bad", sample(5, rejected_png=None)), *good[6:]])
    found = run(tmp_path / "skip", tmp_path / "train", 2, 2, max_steps=6, on_bad_sample="skip")
    streams = [one["stream"] for one in found]
    assert [len(stream) for stream in streams] == [12, 12]
    assert "bad" not in {key for stream in streams for key, _ in stream}
    with pytest.raises(ProcessRaisedException, match="sample 'bad': lacks its rejected image"):
        run(tmp_path / "error", tmp_path / "train", 2, 2, max_steps=6)
