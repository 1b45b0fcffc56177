"""Training from cached latents against training from images: time and memory of a step, waiting for data.

    python benchmarks/cached_step.py                        # toy world, and a small model of Stable Diffusion's shape
    python benchmarks/cached_step.py --scale full --resolution 512 --device cuda

Both arms run in one process on the same pairs, in turns, with SC-DPO, a LoRA of rank 16 and AdamW; ratios come from
medians of steps. Memory is that of the frozen encoders: bytes of weights that the cached arm does not load, and on a
GPU also what a step takes above what is resident before it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from networks import SCALES, TOY, random_pairs, random_pipeline

from lit_safety.adapters import LoRA
from lit_safety.backbones.lowered import lower_frozen
from lit_safety.cli.precompute import precompute
from lit_safety.core.progress import quiet_libraries
from lit_safety.data import PreferenceDataModule
from lit_safety.data.reading.batch import PairBatch
from lit_safety.modules import SCDPO


class Arm:
    """One way to train: a module on shards, stepped by hand so that waiting and computing are told apart."""

    def __init__(self, pipeline: Path, shards: Path, options: argparse.Namespace, precision: Any) -> None:
        self.device = torch.device(options.device)
        self.precision = precision
        # Read with one worker, as the shipped configuration does: what is measured is a step, not a cold start.
        self.data = PreferenceDataModule(train=str(shards), batch_size=options.batch_size, num_workers=1)
        self.module = SCDPO(str(pipeline), lora=LoRA(rank=16))
        self.module.configure_model()
        if precision is not None:  # as a fit in bf16-mixed does
            lower_frozen(self.module.backbone.denoiser, precision)
        self.module.to(self.device).train()
        self.optimizer = torch.optim.AdamW([p for _, p in self.module.trainable_parameters()], lr=1e-4)
        self.batches = self._batches()
        self.steps: list[float] = []
        self.waits: list[float] = []
        self.peak = 0

    def _batches(self) -> Iterator[PairBatch]:
        loader = self.data.train_dataloader()
        while True:
            yield from loader

    def step(self) -> None:
        """One training step; what it took and what of it was waiting for data."""
        self._wait_for_device()
        resident = 0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            resident = torch.cuda.memory_allocated()
        began = time.perf_counter()
        batch = next(self.batches)
        waited = time.perf_counter() - began
        batch = batch.to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, self.precision, enabled=self.precision is not None):
            loss = self.module.loss(self.module.errors(batch), batch).loss.mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._wait_for_device()
        self.steps.append(time.perf_counter() - began)
        self.waits.append(waited)
        if self.device.type == "cuda":
            self.peak = max(self.peak, torch.cuda.max_memory_allocated() - resident)

    def _wait_for_device(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def encoders(self) -> int:
        """Bytes of encoders' weights that were loaded."""
        parts = self.module.backbone.parts
        networks = [parts.get(name) for name in parts.loaded if name in ("vae", "text_encoder")]
        return sum(p.numel() * p.element_size() for network in networks for p in network.parameters())


def compare(name: str, pipeline: Path, shards: Path, options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Cached against uncached on the same pairs."""
    cached = work / f"{name}-cached"
    began = time.perf_counter()
    precompute(str(shards), str(pipeline), str(cached), batch_size=options.batch_size, device=options.device)
    made = time.perf_counter() - began
    precision = torch.bfloat16 if options.precision == "bf16" else None
    arms = {"uncached": Arm(pipeline, shards, options, precision), "cached": Arm(pipeline, cached, options, precision)}
    for number in range(options.warmup + options.steps):
        for arm in arms.values():  # in turns, so that whatever else the machine does slows both
            arm.step()
            if number < options.warmup:
                arm.steps.clear()
                arm.waits.clear()
    median = {which: statistics.median(arm.steps) for which, arm in arms.items()}
    result = {
        "model": name,
        "device": torch.cuda.get_device_name() if options.device.startswith("cuda") else "cpu",
        "threads": torch.get_num_threads(),
        "precision": options.precision,
        "batch_size": options.batch_size,
        "steps": options.steps,
        "seconds a step": {which: round(value, 4) for which, value in median.items()},
        "quartiles": {which: quartiles(arm.steps) for which, arm in arms.items()},
        "uncached / cached": round(median["uncached"] / median["cached"], 3),
        "waiting for data, cached, % of wall time": round(
            100 * sum(arms["cached"].waits) / sum(arms["cached"].steps), 2
        ),
        "encoders not loaded, MB": round((arms["uncached"].encoders() - arms["cached"].encoders()) / 1e6, 1),
        "seconds to make the cache": round(made, 1),
    }
    if options.device.startswith("cuda"):
        result["GB a step takes above what is resident"] = {
            which: round(arm.peak / 1e9, 2) for which, arm in arms.items()
        }
    return result


def quartiles(values: list[float]) -> list[float]:
    """First and third."""
    return [round(float(value), 4) for value in np.quantile(values, [0.25, 0.75])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("toy", "sd15"), default=["toy", "sd15"])
    parser.add_argument("--scale", choices=tuple(SCALES), default="small", help="of the random SD1.5-shaped model")
    parser.add_argument("--resolution", type=int, default=64, help="pixels, for the SD1.5-shaped model; 512 is its own")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    options = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for name in options.models:
            torch.manual_seed(0)
            if name == "toy":
                pipeline, shards = TOY / "pipeline", TOY / "shards" / "train"
            else:
                pipeline = random_pipeline(work / "pipeline", options.scale)
                shards = random_pairs(work / "pairs", 8 * options.batch_size, options.resolution)
                name = f"sd15-shaped, {options.scale}, {options.resolution} px"
            print(json.dumps(compare(name, pipeline, shards, options, work), indent=1))


if __name__ == "__main__":
    main()
