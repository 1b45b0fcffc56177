"""SIGKILL at random moments of a run, again and again until it is through: the adapter is an undisturbed run's."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.helpers.methods import exported, write_config
from tests.helpers.ranks import Ranks, start

KILLS = 20
STEPS = 12


@pytest.mark.slow
def test_killed_at_random_and_resumed_ends_in_the_same_bits(tiny_pipeline: Path, user_shards: Path, tmp_path: Path):
    """A checkpoint at every step, so that kills also fall into its writing; Adam, with its moments and step count.

    A run is killed once or twice, then it may end. Most kills come at a moment drawn over the time from the first
    checkpoint that a process writes to its end, every fifth one while it starts.
    """
    chance = random.Random(0)
    words = command(tmp_path / "whole", tiny_pipeline, user_shards)
    begun, first, ended = times(start(words, tmp_path / "whole" / "logs", ranks=1), tmp_path / "whole")
    whole = exported(tmp_path / "whole" / "runs" / "fit" / "latest")
    kills = after_a_checkpoint = trial = 0
    while kills < KILLS:
        trial += 1
        assert trial <= 3 * KILLS, f"{kills} kills only: runs end before they are killed"
        folder = tmp_path / f"trial-{trial}"
        words = command(folder, tiny_pipeline, user_shards)
        for _ in range(chance.randint(1, 2)):
            before = newest(folder)
            running = start(words, folder / "logs", ranks=1)
            if kills % 5 == 4:
                delay = chance.uniform(0, first - begun)
            else:
                waited(running, lambda folder=folder, before=before: newest(folder) != before)
                delay = chance.uniform(0, ended - first)
            if running.wait(delay) != [None]:
                break
            kills += 1
            after_a_checkpoint += bool(newest(folder))
        last = start(words, folder / "logs", ranks=1)
        assert last.wait() == [0], f"trial {trial}\n{last.said()}"
        found = exported(folder / "runs" / "fit" / "latest")
        assert found.keys() == whole.keys()
        assert all(torch.equal(found[name], value) for name, value in whole.items()), f"trial {trial}"
    print(f"{kills} kills in {trial} runs, {after_a_checkpoint} of them after a checkpoint")
    assert after_a_checkpoint >= KILLS // 2


def command(folder: Path, pipeline: Path, shards: Path) -> list[str]:
    """A run of 12 steps, 3 passes over the pairs."""
    folder.mkdir()
    config = write_config(folder, "scdpo", pipeline, shards, max_steps=STEPS, limit_val_batches=0)
    text = config.read_text().replace("every_n_train_steps: 2", "every_n_train_steps: 1")
    config.write_text(text.replace("save_top_k: -1", "save_top_k: 1\n      monitor: step\n      mode: max"))
    adam = ["--model.init_args.optimizer", "torch.optim.AdamW", "--model.init_args.optimizer.init_args.lr", "1e-3"]
    return ["fit", "--config", str(config), "--ckpt_path", "auto", *adam, "--data.init_args.batch_size", "4"]


def times(running: Ranks, folder: Path) -> tuple[float, float, float]:
    """When an undisturbed run began, had its first checkpoint, and was through."""
    begun = time.monotonic()
    assert waited(running, lambda: newest(folder) > 0), running.said()
    first = time.monotonic()
    assert running.wait() == [0], running.said()
    return begun, first, time.monotonic()


def waited(running: Ranks, until: Callable[[], bool]) -> bool:
    """Whether ``until`` came true before the run ended."""
    while not until():
        if running.processes[0].exitcode is not None:
            return False
        time.sleep(0.002)
    return True


def newest(folder: Path) -> int:
    """When the last checkpoint took its name, in ns; 0: there is none."""
    return max((file.stat().st_mtime_ns for file in folder.glob("runs/fit/*/checkpoints/last.ckpt")), default=0)
