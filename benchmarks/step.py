"""Our training step against the published recipe, in one run, in turns, at the same precision.

    python benchmarks/step.py --model sd15 --count            # operations alone, on a meta device: no memory, seconds
    python benchmarks/step.py --model sd15 --scale quarter --baseline published        # what two CPU cores can do
    python benchmarks/step.py --model sdxl --device cuda --baseline published
    python benchmarks/step.py --model toy --fit               # start-up to the first step, one process against two

The published recipe (arXiv 2412.10493): images and words encoded at every step, a second whole UNet as the reference.
Ours: from cached latents and text, and from a reference cache. Weights are random and of the model's own size (the toy
world's are its own); fp32 on a CPU, bf16 on a GPU. Memory is each side's peak in a process of its own. The share that
operations allow is the ratio of the counted operations; the ceiling is a matrix product measured beside the steps.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from arms import Ours, Published
from flops import FLOOR, PAIR_FLOOR, PAIR_FLOOR_CHECKPOINTING, blocks_table, ceiling, pair_table, parts_table
from networks import MODELS, RESOLUTION, SCALES, weights_size

from lit_safety.core.progress import quiet_libraries
from lit_safety.modules.speed import Speed

ARMS = ("published", "cached", "reference cache")


def main() -> None:
    options = parse()
    quiet_libraries()
    if options.memory_of is not None:
        print(json.dumps(peak(options)))
    elif options.fit:
        from fit_clock import compare_fits

        print(json.dumps(compare_fits(options.model, options.scale, options.resolution, options.steps), indent=1))
    else:
        print(json.dumps(counts(options) if options.count else compare(options), indent=1))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="toy")
    parser.add_argument("--baseline", choices=("published", "none"), default="published")
    parser.add_argument("--scale", choices=tuple(SCALES), default="full", help="of the random models")
    parser.add_argument("--resolution", type=int, help="pixels; default: the model's own")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", help="backend of the regional compilation of our step")
    parser.add_argument("--checkpointing", action="store_true", help="of the baseline, which forces it on SDXL")
    parser.add_argument("--count", action="store_true", help="count operations and stop")
    parser.add_argument("--no_memory", action="store_true", help="leave out the peak memory of each side")
    parser.add_argument("--fit", action="store_true", help="time `fit` itself: start-up, and two processes")
    parser.add_argument("--memory_of", choices=ARMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.fit and options.model == "sdxl":
        parser.error("--fit times the command line on toy or sd15; for sdxl leave it out")
    options.resolution = options.resolution or RESOLUTION.get(options.model, 32)
    return options


def counts(options: argparse.Namespace) -> dict[str, Any]:
    """Operations of the model beside the floor they are said to have."""
    key = (options.model, options.scale)
    parts = parts_table(options.model, options.scale, options.resolution)
    pairs = pair_table(options.model, options.scale, options.resolution, options.checkpointing)
    known = PAIR_FLOOR_CHECKPOINTING if options.checkpointing else PAIR_FLOOR
    floor, pair_floor = FLOOR.get(key, {}), dict(zip(ARMS, known.get(key, ()), strict=False))
    return {
        "TFLOP an image (counted, floor)": {name: [round(value, 4), floor.get(name)] for name, value in parts.items()},
        "TFLOP a pair (counted, floor)": {
            name: [round(value, 3), pair_floor.get(name)] for name, value in pairs.items()
        },
        "TFLOP a pair, cached reference": {
            name: round(value, 3)
            for name, value in blocks_table(options.model, options.scale, options.resolution).items()
        },
    }


class Stepper:
    """Steps of one arm; the two arms of ours share a network."""

    def __init__(self, name: str, arm: Published | Ours) -> None:
        self.name, self.arm = name, arm
        self.seconds: list[float] = []
        self.busy: list[float] = []
        """Seconds of processor time: on a machine that does other things too, the steadier measure of a CPU's work."""

    def step(self, keep: bool = True) -> None:
        self.arm.clock.wait()
        began, worked = time.perf_counter(), time.process_time()
        if isinstance(self.arm, Published):
            self.arm.step()
        else:
            self.arm.step(self.name == "reference cache")
        self.arm.clock.wait()
        if keep:
            self.seconds.append(time.perf_counter() - began)
            self.busy.append(time.process_time() - worked)

    def shares(self) -> dict[str, float]:
        """Percent of a step by part."""
        clock = self.arm.clock
        clock.seconds, clock.on = {}, True
        self.step(keep=False)
        clock.on = False
        total = sum(clock.seconds.values())
        return {name: round(100 * value / total, 1) for name, value in clock.seconds.items()}


def steppers(options: argparse.Namespace, names: tuple[str, ...]) -> list[Stepper]:
    device = torch.device(options.device)
    size = (options.model, options.scale, device, options.batch_size, options.resolution)
    found = []
    if "published" in names:
        found.append(Stepper("published", Published(*size, options.checkpointing)))
    if mine := [name for name in names if name != "published"]:
        arm = Ours(*size, speed=Speed(compile=options.compile))
        found += [Stepper(name, arm) for name in mine]
    return found


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """All arms in turns."""
    names = ARMS if options.baseline == "published" else ARMS[1:]
    device = torch.device(options.device)
    arms = steppers(options, names)
    ceilings = []
    for number in range(options.warmup + options.steps):
        for arm in arms:  # in turns, so that whatever else the machine does slows all of them
            arm.step(keep=number >= options.warmup)
        ceilings.append(ceiling(device, 0.5))
    tflop = pair_table(options.model, options.scale, options.resolution, options.checkpointing)
    best = statistics.median(ceilings)
    result: dict[str, Any] = {
        "model": f"{options.model}, {options.scale}" if options.model != "toy" else "toy",
        "pixels": options.resolution,
        "pairs a step": options.batch_size,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "ceiling, TFLOP/s": round(best, 4),
        "arms": {},
    }
    medians = {arm.name: statistics.median(arm.seconds) for arm in arms}
    busy = {arm.name: statistics.median(arm.busy) for arm in arms}
    for arm in arms:
        seconds = medians[arm.name]
        rate = options.batch_size / seconds
        entry: dict[str, Any] = {
            "seconds a step": round(seconds, 4),
            "all": [round(one, 4) for one in arm.seconds],
            "of processor time": round(busy[arm.name], 4),
            "pairs/s": round(rate, 4),
            "TFLOP a pair": float(f"{tflop[arm.name]:.4g}"),
            "TFLOP/s of the ceiling, %": round(100 * tflop[arm.name] * rate / best, 1),
            "share of the step, %": arm.shares(),
        }
        if "published" in medians and arm.name != "published":
            times = medians["published"] / seconds
            allowed = tflop["published"] / tflop[arm.name]
            entry["times as fast as published"] = round(times, 3)
            entry["operations allow"] = round(allowed, 3)
            entry["of that, %"] = round(100 * times / allowed, 1)
            if device.type == "cpu":
                entry["of that, by processor time, %"] = round(100 * busy["published"] / busy[arm.name] / allowed, 1)
        result["arms"][arm.name] = entry
    if not options.no_memory:
        arms.clear()  # the other processes need the device's memory
        del arm
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        result["memory"] = memory(names)
    return result


def memory(names: tuple[str, ...]) -> dict[str, Any]:
    """MB of each arm's peak above what the imports take, in processes of their own, with what its networks weigh."""
    found = {}
    for name in names:
        command = [sys.executable, str(Path(__file__)), *sys.argv[1:], "--memory_of", name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[name] = json.loads(done.stdout)
    return found


def peak(options: argparse.Namespace) -> dict[str, float]:
    """In this process: MB of the peak of two steps, and of the networks' weights."""
    cuda = options.device.startswith("cuda")
    before = resident()
    (arm,) = steppers(options, (options.memory_of,))
    if cuda:  # networks are made in fp32 there and lowered; a fit makes them in main memory
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        arm.step()
    most = torch.cuda.max_memory_allocated() if cuda else resident() - before
    one = arm.arm
    if isinstance(one, Published):
        weights = {"second UNet": weights_size(one.reference), "VAE": weights_size(one.vae)}
        weights["text"] = weights_size(*one.texts)
    else:
        weights = {}
    return {"peak": round(most / 1e6, 1)} | {name: round(size / 1e6, 1) for name, size in weights.items()}


def resident() -> int:
    """Bytes of the most memory that this process has had."""
    status = Path("/proc/self/status")
    if status.is_file():  # what `getrusage` says begins with the parent's
        line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
