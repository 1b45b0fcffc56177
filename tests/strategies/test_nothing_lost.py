"""Signals, a full disk, a dead rank, numbers that are none: a clear end, and a checkpoint to go on from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from lit_safety.adapters.start_from import read_file
from tests.helpers.methods import exported, under, write_config
from tests.helpers.ranks import Ranks, run, start

TWO = ["--trainer.devices", "2"]
SLOWER = ("ddp", "fsdp")


@pytest.fixture
def latest(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "fit" / "latest"


def accident(kind: str, step: int, rank: int = 0) -> dict[str, object]:
    return {"class_path": "tests.helpers.accidents.Accident", "init_args": {"kind": kind, "step": step, "rank": rank}}


def steps_in(checkpoint: Path) -> int:
    return int(read_file(checkpoint)["global_step"])


def complaint(ranks: Ranks, rank: int = 0) -> str:
    return next(line for line in ranks.said(rank).splitlines() if line.startswith("error: "))


@pytest.mark.parametrize("kind", ["sigterm", pytest.param("sigterm-validation", marks=pytest.mark.slow)])
def test_after_sigterm_on_one_rank_both_go_on_to_the_bit(
    kind: str, tiny_pipeline: Path, user_shards: Path, tmp_path: Path, latest: Path
):
    """The step is finished and saved; rank 0 says how it ended, for schedulers: 143 = 128 + SIGTERM."""
    often = {"val_check_interval": 3, "check_val_every_n_epoch": None}
    config = write_config(tmp_path, "scdpo", tiny_pipeline, user_shards, **often)
    run(["fit", "--config", str(config), *under("ddp"), *TWO], tmp_path / "logs")
    whole = exported(latest)
    at, rank = (3, 0) if kind == "sigterm-validation" else (2, 1)
    config = write_config(tmp_path, "scdpo", tiny_pipeline, user_shards, more=[accident(kind, at, rank)], **often)
    command = ["fit", "--config", str(config), *under("ddp"), *TWO]
    stopped = start(command, tmp_path / "logs")
    assert stopped.wait() == [143, 0], stopped.said()
    assert "stopped by SIGTERM; saved " in stopped.said()
    assert not (latest / "adapter").exists()
    assert steps_in(latest / "checkpoints" / "last.ckpt") == 3
    config = write_config(tmp_path, "scdpo", tiny_pipeline, user_shards, **often)
    run(["fit", "--config", str(config), *under("ddp"), *TWO, "--ckpt_path", "last"], tmp_path / "logs")
    found = exported(latest)
    assert all(torch.equal(found[name], value) for name, value in whole.items())


def test_a_full_disk_ends_the_run_on_all_ranks_and_leaves_the_checkpoint_before(
    tiny_pipeline: Path, user_shards: Path, tmp_path: Path
):
    """`/dev/full`, where the checkpoint of step 4 is written, answers as a full disk does."""
    config = write_config(tmp_path, "scdpo", tiny_pipeline, user_shards, more=[accident("full-disk", 3, 0)])
    kept = yaml.safe_load(config.read_text())
    keep = next(one for one in kept["trainer"]["callbacks"] if one["class_path"].endswith("ModelCheckpoint"))
    keep["init_args"]["dirpath"] = str(tmp_path / "kept")
    config.write_text(yaml.safe_dump(kept))
    ended = start(["fit", "--config", str(config), *under("ddp"), *TWO], tmp_path / "logs")
    assert ended.wait() == [2, 2], ended.said()
    for rank in (0, 1):
        assert "step=4.ckpt: cannot be written (No space left on device)" in complaint(ended, rank)
        assert "last.ckpt is whole" in complaint(ended, rank)
    assert steps_in(tmp_path / "kept" / "last.ckpt") == steps_in(tmp_path / "kept" / "step=2.ckpt") == 2
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["last.ckpt", "step=2.ckpt"]


def test_a_dead_rank_ends_the_run_and_leaves_the_last_checkpoint(
    tiny_pipeline: Path, user_shards: Path, tmp_path: Path, latest: Path
):
    config = write_config(tmp_path, "scdpo", tiny_pipeline, user_shards, more=[accident("sigkill", 3, 1)])
    ended = start(["fit", "--config", str(config), *under("ddp"), *TWO], tmp_path / "logs")
    assert ended.wait() == [2, -9], ended.said()
    assert "another rank has ended" in complaint(ended)
    assert steps_in(latest / "checkpoints" / "last.ckpt") == 2


@pytest.mark.parametrize("strategy", ["deepspeed_zero2", *(pytest.param(n, marks=pytest.mark.slow) for n in SLOWER)])
def test_a_loss_that_is_no_number_on_one_rank_ends_the_run_on_both(
    strategy: str, tiny_pipeline: Path, user_shards: Path, tmp_path: Path, latest: Path
):
    config = write_config(tmp_path, "scdpo", tiny_pipeline, user_shards, more=[accident("nan", 3, 1)])
    ended = start(["fit", "--config", str(config), *under(strategy), *TWO], tmp_path / "logs")
    assert ended.wait() == [2, 2], ended.said()
    for rank in (0, 1):
        assert "not finite at samples" in complaint(ended, rank)
    kept = latest / "checkpoints"
    assert (kept / "last.ckpt").exists()
    assert not (kept / "step=4.ckpt").exists()
