"""A manifest of a million pairs: time to open it, time to the first batch, and memory against the number of pairs.

    python benchmarks/manifest.py                           # 1,000 / 100,000 / 1,000,000 pairs in 2,000 shards at most

The pairs are synthetic: every shard of a set is a hard link to one tar file, so that a million of them cost no disk.
Each size is measured in a process of its own, whose memory is its own; what grows with the number of pairs is printed
as bytes a pair.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from lit_safety.data.format.manifest import Manifest, SampleClass, save_manifest

CATEGORIES = ("hate", "harassment", "violence", "self-harm", "sexual", "shocking", "illegal-activity", "propaganda")


def make(folder: Path, pairs: int, shards: int) -> Path:
    """A folder of ``shards`` shards of ``pairs // shards`` pairs each; all of them are one file."""
    from PIL import Image

    from lit_safety.data.format.writer import ShardWriter

    each = pairs // shards
    image = Image.new("RGB", (8, 8))
    with ShardWriter(folder, samples_per_shard=each) as writer:
        for number in range(each):
            known: dict[str, Any] = {
                "prompt": "a cat",
                "prompt_kind": "harmful",
                "order": "safety",
                "categories": ["violence"],
            }
            known["harmful"] = {"chosen": False, "rejected": True}
            writer.write(f"{number:06d}", known, image, image)
    (listed,) = writer.close().shardlist
    classes = tuple(
        SampleClass(kind, "safety", (category,))
        for kind, category in itertools.product(("harmful", "clean"), CATEGORIES)
    )
    numbers = tuple(number % len(classes) for number in range(each))
    one = replace(listed, classes=numbers, sha256=None)
    names = [f"shard-{number:06d}.tar" for number in range(shards)]
    for name in names[1:]:
        os.link(folder / names[0], folder / name)
    save_manifest(Manifest(tuple(replace(one, url=name) for name in names), classes), folder)
    return folder


def measure(folder: str) -> dict[str, float]:
    """In this process: seconds to open the manifest, seconds to the first batch, MB of memory that took."""
    from lit_safety.data.datamodule import PreferenceDataModule
    from lit_safety.data.format.manifest import load_manifest

    before = resident()
    began = time.perf_counter()
    load_manifest(folder)
    opened = time.perf_counter() - began
    data = PreferenceDataModule(train=folder, batch_size=8, categories=["violence", "hate"])
    began = time.perf_counter()
    batches = iter(data.train_dataloader())
    next(batches)
    first = time.perf_counter() - began
    for _ in range(20):
        next(batches)
    return {"open s": opened, "first batch s": first, "memory MB": resident() - before}


def resident() -> float:
    """The process's memory in MB, as the system counts it."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) / 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[1_000, 100_000, 1_000_000])
    parser.add_argument("--shards", type=int, default=2_000, help="at most; a shard holds at least 10 pairs")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for pairs in options.pairs:
            shards = min(options.shards, max(pairs // 10, 1))
            made = make(Path(folder) / str(pairs), pairs, shards)
            command = [sys.executable, __file__, "--measure", str(made)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            size = (made / "manifest.json").stat().st_size
            row = {
                "pairs": pairs,
                "shards": shards,
                "manifest MB": size / 1e6,
                **json.loads(done.stdout.splitlines()[-1]),
            }
            found.append(row)
            print(json.dumps({name: round(value, 3) for name, value in row.items()}))
    if len(found) > 1:
        first, last = found[0], found[-1]
        more = (last["memory MB"] - first["memory MB"]) * 1e6 / (last["pairs"] - first["pairs"])
        ratio = last["memory MB"] / max(first["memory MB"], 0.1)
        print(f"{last['pairs'] / first['pairs']:.0f} x the pairs: {ratio:.2f} x the memory, {more:.1f} bytes a pair")


if __name__ == "__main__":
    main()
