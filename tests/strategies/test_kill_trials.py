"""SIGKILL at random moments of a run, again and again until it is through: the adapter is an undisturbed run's."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
import torch
from methods import exported, write_config
from ranks import run, start

TRIALS = 20
STEPS = 12


@pytest.mark.slow
def test_killed_at_random_and_resumed_ends_in_the_same_bits(tiny_pipeline: Path, user_shards: Path, tmp_path: Path):
    """A checkpoint at every step, so that kills also fall into its writing; Adam, with its moments and step count.

    Each trial is killed once at a moment drawn over the time that a whole run takes, start-up included, and once more
    after it was resumed; then it may end.
    """

    def command(folder: Path) -> list[str]:
        folder.mkdir()
        config = write_config(folder, "scdpo", tiny_pipeline, user_shards, max_steps=STEPS, limit_val_batches=0)
        text = config.read_text().replace("every_n_train_steps: 2", "every_n_train_steps: 1")
        config.write_text(text.replace("save_top_k: -1", "save_top_k: 1\n      monitor: step\n      mode: max"))
        adam = ["--model.init_args.optimizer", "torch.optim.AdamW", "--model.init_args.optimizer.init_args.lr", "1e-3"]
        return ["fit", "--config", str(config), *adam, "--data.init_args.batch_size", "4"]

    began = time.monotonic()
    run(command(tmp_path / "whole"), tmp_path / "logs", ranks=1)
    lasts = time.monotonic() - began
    whole = exported(tmp_path / "whole" / "runs" / "fit" / "latest")
    chance = random.Random(0)
    resumed_from_a_checkpoint = 0
    for trial in range(TRIALS):
        folder = tmp_path / f"trial-{trial}"
        words = command(folder)
        for _ in range(2):
            running = start([*words, *last(folder)], folder / "logs", ranks=1)
            running.wait(chance.uniform(0.1, 1.0) * lasts)  # and is killed
        resumed_from_a_checkpoint += bool(last(folder))
        run([*words, *last(folder)], folder / "logs", ranks=1)
        found = exported(folder / "runs" / "fit" / "latest")
        assert all(torch.equal(found[name], value) for name, value in whole.items()), f"trial {trial}"
    assert resumed_from_a_checkpoint >= TRIALS // 4


def last(folder: Path) -> list[str]:
    """Go on where there is something to go on from."""
    return ["--ckpt_path", "last"] if list(folder.glob("runs/fit/*/checkpoints/*.ckpt")) else []
