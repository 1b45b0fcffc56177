"""`fit` itself, through the command line: seconds to the first step, and one process against two."""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

ROOT = Path(__file__).parents[1]


class StepClock(Callback):
    """Writes down when each step ended.

    Args:
        file: where to, JSON: a list of seconds since the epoch.
    """

    def __init__(self, file: str) -> None:
        self.file = file
        self.ends: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.ends.append(time.time())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            Path(self.file).write_text(json.dumps(self.ends), encoding="utf-8")


def compare_fits(model: str, scale: str, resolution: int, steps: int) -> dict[str, Any]:
    """`configs/scdpo.yaml` for `steps` steps on cached shards: with one process, then with two by DDP.

    Each process has one thread, so that two of them have twice what one has.
    """
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        pipeline, shards = inputs(model, scale, resolution, work)
        found = {devices: run(work, pipeline, shards, devices, steps) for devices in (1, 2)}
    alone, both = found[1]["pairs/s"], found[2]["pairs/s"]
    return {
        "model": model,
        "start of the command to the end of the first step, s": found[1]["first step"],
        "one process": found[1],
        "two processes": found[2],
        "two / one": round(both / alone, 3),
    }


def inputs(model: str, scale: str, resolution: int, work: Path) -> tuple[Path, Path]:
    """A pipeline and cached shards of it."""
    from networks import TOY, random_pairs, random_pipeline

    from lit_safety.cli.precompute import precompute

    pipeline, pairs = TOY / "pipeline", TOY / "shards" / "val"
    if model != "toy":
        pipeline, pairs = random_pipeline(work / "pipeline", scale), random_pairs(work / "pairs", 32, resolution)
    precompute(str(pairs), str(pipeline), str(work / "cached"))
    return pipeline, work / "cached"


def run(work: Path, pipeline: Path, shards: Path, devices: int, steps: int, batch: int = 4) -> dict[str, float]:
    file = work / f"ends-{devices}.json"
    clock = {"class_path": "fit_clock.StepClock", "init_args": {"file": str(file)}}
    settings: dict[str, Any] = {
        "config": "configs/scdpo.yaml",
        "run.root": work / "runs",
        "model.init_args.pretrained": pipeline,
        "data.init_args.train": shards,
        "data.init_args.val": "null",
        "data.init_args.num_workers": 0,
        "data.init_args.batch_size": batch,
        "trainer.max_steps": steps + 2,
        "trainer.limit_val_batches": 0,
        "trainer.logger": "false",
        "trainer.accelerator": "cpu",
        "trainer.devices": devices,
        "trainer.strategy": "auto" if devices == 1 else "ddp",
        "trainer.callbacks": json.dumps([clock]),
    }
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    began = time.time()
    subprocess.run(
        [sys.executable, "-m", "lit_safety", "fit", *words], cwd=ROOT, env=environment, check=True, stdout=sys.stderr
    )
    ends = json.loads(file.read_text(encoding="utf-8"))
    step = statistics.median(later - earlier for earlier, later in itertools.pairwise(ends[1:]))
    return {
        "first step": round(ends[0] - began, 2),
        "seconds a step": round(step, 4),
        "pairs/s": round(batch * devices / step, 3),
    }
