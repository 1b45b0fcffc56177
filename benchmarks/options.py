"""Two ways to a faster step, each against our own on a reference cache, in turns in one run.

    OMP_NUM_THREADS=1 python benchmarks/options.py --model toy --batch_size 16 --steps 20      # more threads: see main

Adapters in the middle and upper blocks alone: the backward pass ends there. Selective backward: a forward pass without
gradient chooses the pairs that go forward again and backward; here a fixed share of them, whatever they teach. What
either costs in quality is measured by configs/studies/speed.yaml.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
from arms import Ours
from networks import MODELS, RESOLUTION, SCALES

from lit_safety.core.progress import quiet_libraries
from lit_safety.modules.speed import SelectiveBackward, Speed

#: No pair's gradient weight reaches it, so that each stays in with the smallest probability.
ALWAYS_BELOW = 1e9
SETTINGS: dict[str, dict[str, Any]] = {
    "all blocks": {},
    "mid and up blocks": {"blocks": ["mid_block", "up_blocks"]},
    "up blocks": {"blocks": ["up_blocks"]},
    "half of the pairs": {"kept": 0.5},
    "a quarter of the pairs": {"kept": 0.25},
    "a tenth of the pairs": {"kept": 0.1},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="toy")
    parser.add_argument("--scale", choices=tuple(SCALES), default="full", help="of the random models")
    parser.add_argument("--resolution", type=int, help="pixels; default: the model's own")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    options.resolution = options.resolution or RESOLUTION.get(options.model, 32)
    quiet_libraries()
    print(json.dumps(compare(options), indent=1))


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of a step and the ratio to a step on all blocks and pairs."""
    device = torch.device(options.device)
    size = (options.model, options.scale, device, options.batch_size, options.resolution)
    arms: dict[str, Ours] = {}
    for name, settings in SETTINGS.items():
        kept = settings.get("kept")
        speed = Speed(selective=None if kept is None else SelectiveBackward(ALWAYS_BELOW, kept))
        arms[name] = Ours(*size, speed=speed, blocks=settings.get("blocks"))
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    shares: dict[str, float] = {}
    for number in range(1 + options.steps):
        for name, arm in arms.items():
            # Other pairs stay in at each step; timesteps and noise are the cache's (`fixed_seeds`).
            arm.batch.seeds = [number * options.batch_size + row for row in range(options.batch_size)]
            arm.clock.wait()
            began = time.perf_counter()
            logs = arm.step(True)
            arm.clock.wait()
            if number > 0:
                seconds[name].append(time.perf_counter() - began)
                shares[name] = shares.get(name, 0.0) + float(logs.get("backward/kept", torch.ones(1))) / options.steps
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "model": options.model,
        "pairs a step": options.batch_size,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "arms": {
            name: {
                "seconds a step": round(medians[name], 4),
                "pairs that went backward, %": round(100 * shares[name], 1),
                "times as fast": round(medians["all blocks"] / medians[name], 3),
            }
            for name in arms
        },
    }


if __name__ == "__main__":
    main()
