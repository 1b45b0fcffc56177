"""Where the time of an evaluation goes: 1,000 toy images (500 prompts, 2 arms) with every metric of the toy world.

    python benchmarks/evaluate.py [--steps 12] [--prompts 500]

Prints wall and processor seconds by part. On a busy machine the processor seconds, divided by the cores, say what a
quiet one would take.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lit_safety.drawing.arms import Arm
from lit_safety.drawing.gallery import DrawingSettings
from lit_safety.drawing.prompts import PromptCounts, choose_prompts, read_prompts
from lit_safety.evaluation import run as run_module
from lit_safety.evaluation.quality import Quality
from lit_safety.evaluation.report import write_report
from lit_safety.evaluation.run import Run
from lit_safety.judges.load import load_judge

WORLD = Path("data/toyworld")
SPENT: dict[str, list[float]] = {}


@contextmanager
def part(name: str) -> Iterator[None]:
    """Adds the time spent within to a part's sum."""
    wall, processor = time.perf_counter(), time.process_time()
    yield
    spent = SPENT.setdefault(name, [0.0, 0.0])
    spent[0] += time.perf_counter() - wall
    spent[1] += time.process_time() - processor


def main() -> None:
    """Evaluate the base and a negative prompt, part by part, then print the times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--prompts", type=int, default=500, help="of all kinds, multiples of 25")
    options = parser.parse_args()
    arms = {"base": Arm(), "negative prompt": Arm(negative_prompt="gun")}
    drawing = DrawingSettings(options.steps, 3.0, device="cpu")
    share = options.prompts // 25
    with tempfile.TemporaryDirectory() as folder:
        with part("load: prompts, judges, CLIP, reference of FID"):
            selection = PromptCounts(share, 4 * share, 4 * share, options.prompts - 16 * share)
            prompts = choose_prompts(read_prompts(WORLD / "prompts" / "test.csv"), selection)
            judges = [load_judge(str(WORLD / name)) for name in ("judge", "judge_b")]
            reference = str(WORLD / "shards" / "test")
            quality = Quality(prompts, judges[0], "judge", str(WORLD / "clip"), reference)
        run = Run(
            str(WORLD / "pipeline"), "test.csv", prompts, selection, judges, arms, drawing, Path(folder) / "report",
            quality=quality,
        )  # fmt: skip
        with (
            timed(run_module, "draw_missing", "load the arms, draw, write"),
            timed(run_module, "look", "read; judge, two judges; features, CLIPScore"),
            timed(Quality, "report", "FID"),
            part("all but the loading above and Python's own start"),
        ):
            results = run.execute()
            with part("report and page"):
                write_report(results, blur=False)
    print(f"{len(prompts)} prompts, {len(arms)} arms, {options.steps} steps, {torch.get_num_threads()} threads")
    for name, (wall, processor) in SPENT.items():
        print(f"{name:<64} {wall:7.1f} s wall {processor:7.1f} s processor")


@contextmanager
def timed(owner: Any, name: str, label: str) -> Iterator[None]:
    """Within, calls of a function count for a part."""
    function = getattr(owner, name)

    def call(*args: Any, **keywords: Any) -> Any:
        with part(label):
            return function(*args, **keywords)

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, function)


if __name__ == "__main__":
    main()
