"""What a GPU makes of training, `precompute` and `evaluate`: one script of at most eight minutes, nothing downloaded.

    python benchmarks/gpu.py --out gpu.json            # twelve cells, eight minutes
    python benchmarks/gpu.py --quick --out gpu.json    # six cells, three minutes
    python benchmarks/gpu.py --tiny --device cpu       # whether it runs: tiny networks, seconds

A cell is a model of its true shape with random weights, a way to train, and a batch. `published` is the published
recipe (arXiv 2412.10493) on images, `cached` is ours on cached latents and text, `reference` ours on a reference cache,
`compiled` the same with compiled blocks. All compute in bfloat16 on a GPU and in fp32 on a CPU. Of each cell: pairs a
second, how many times that of the published recipe at the same batch, TFLOP/s by operations counted on a step, as a
share of a large matrix product's, the share of the time in which the GPU did nothing, and the peak memory. The commands
`precompute` and `evaluate` run on Stable Diffusion 1.5's shape; their images a second are those of a larger call less
those of a smaller one, so that loading is not in them.

What no time is left for, or what does not fit into memory, is said in its place. Results go to a JSON file, and a table
to the terminal.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from arms import Ours, Published
from flops import ceiling
from networks import TOY, random_pairs, random_pipeline
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lit_safety.core.progress import quiet_libraries
from lit_safety.modules.speed import Speed


@dataclass(frozen=True)
class Cell:
    """One measurement."""

    model: str
    """sd15, sdxl or sd35 (Stable Diffusion 3.5 medium)."""
    arm: str
    """published, cached, reference or compiled."""
    batch: int
    """Pairs a step."""
    resolution: int = 1024
    scale: str = "full"

    @property
    def name(self) -> str:
        return f"{self.model}, {self.arm}, batch {self.batch}"


#: Twelve, chosen to answer: does a GPU wait at batch 1, what does a cache give at batch 8, what does compiling add, and
#: do larger models and a transformer behave alike. The published recipe has no form for flow models.
CELLS = (
    Cell("sd15", "published", 1, 512),
    Cell("sd15", "compiled", 1, 512),
    Cell("sd15", "published", 8, 512),
    Cell("sd15", "cached", 8, 512),
    Cell("sd15", "reference", 8, 512),
    Cell("sd15", "compiled", 8, 512),
    Cell("sdxl", "published", 8),
    Cell("sdxl", "cached", 8),
    Cell("sdxl", "reference", 8),
    Cell("sdxl", "compiled", 8),
    Cell("sd35", "reference", 8),
    Cell("sd35", "compiled", 8),
)
#: Those that the aims of a GPU are stated for.
QUICK = tuple(
    cell
    for cell in CELLS
    if cell.batch == 8 and (cell.arm in ("published", "reference") or (cell.model, cell.arm) == ("sd15", "compiled"))
)
#: Each way to train once; of the transformer because its blocks are alike, so that one is compiled.
TINY = tuple(
    Cell(model, arm, 2, 64, "small")
    for model, arm in (("sd15", "published"), ("sd15", "cached"), ("sd15", "reference"), ("sd35", "compiled"))
)


@dataclass(frozen=True)
class Form:
    """How long it may take."""

    cells: tuple[Cell, ...]
    seconds: float
    """All together; what is not begun by then is left out."""
    each: float
    """Measuring of a cell."""
    images: tuple[int, int]
    """Of the smaller and the larger call of each command."""
    compiler: str = "inductor"


FORMS = {
    "full": Form(CELLS, 480, 6, (8, 72)),
    "quick": Form(QUICK, 180, 4, (8, 40)),
    "tiny": Form(TINY, 120, 0.1, (2, 6), "eager"),
}


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="six cells, three minutes")
    parser.add_argument("--tiny", action="store_true", help="tiny networks, to see whether it runs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", help="JSON file for the results")
    options = parser.parse_args(given)
    device = torch.device(options.device)
    if device.type == "cpu" and not options.tiny:
        parser.error("there is no GPU: true sizes take hours on a CPU; --tiny shows whether it runs")
    quiet_libraries()
    form = FORMS["tiny" if options.tiny else "quick" if options.quick else "full"]
    found = measure(form, device)
    if options.out:
        Path(options.out).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(found))
    return found


def measure(form: Form, device: torch.device) -> dict[str, Any]:
    """Everything, in the order of the cells; the commands come first, as they take the least."""
    began = time.perf_counter()
    best = ceiling(device, min(1.0, form.each))
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "precision": "bfloat16" if device.type == "cuda" else "float32",
        "ceiling, TFLOP/s": round(best, 4),
        "commands": commands(form, device),
        "cells": [],
    }
    arm: Any = None
    made: Cell | None = None
    for cell in form.cells:
        entry: dict[str, Any] = {**asdict(cell), "name": cell.name}
        found["cells"].append(entry)
        if time.perf_counter() - began > form.seconds:
            entry["left out"] = f"no time was left of {form.seconds:g} s"
            continue
        try:
            # One network serves both of ours that are not compiled.
            if made is None or not _alike(made, cell):
                arm = None
                _free(device)
                arm, made = arm_of(cell, device, form.compiler), cell
            entry |= measure_cell(cell, arm, device, form.each, best)
        except torch.OutOfMemoryError:
            entry["left out"], arm, made = "the memory is too small", None, None
            _free(device)
    _compare(found["cells"])
    found["seconds"] = round(time.perf_counter() - began, 1)
    return found


def _alike(one: Cell, other: Cell) -> bool:
    return one == replace(other, arm=one.arm) and {one.arm, other.arm} <= {"cached", "reference"}


def arm_of(cell: Cell, device: torch.device, compiler: str) -> Published | Ours:
    size = (cell.model, cell.scale, device, cell.batch, cell.resolution)
    if cell.arm == "published":
        return Published(*size, checkpointing=cell.model == "sdxl")
    return Ours(*size, speed=Speed(compile=compiler if cell.arm == "compiled" else None))


def measure_cell(
    cell: Cell, arm: Published | Ours, device: torch.device, seconds: float, best: float
) -> dict[str, Any]:
    """Steps of one cell for about ``seconds``, at least three."""

    def step() -> None:
        if isinstance(arm, Published):
            arm.step()
        else:
            arm.step(cell.arm != "cached")

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(2):  # allocators, kernels that are chosen, graphs that are compiled
        step()
    arm.clock.wait()
    taken: list[float] = []
    worked, began = time.process_time(), time.perf_counter()
    while len(taken) < 3 or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        step()
        arm.clock.wait()
        taken.append(time.perf_counter() - start)
    worked, whole = time.process_time() - worked, time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
    median = statistics.median(taken)
    tflop = operations(step, device, compiled=cell.arm == "compiled") / cell.batch
    speed = tflop * cell.batch / median
    busy = 1 - idle_share(step, arm) if device.type == "cuda" else worked / whole / torch.get_num_threads()
    return {
        "steps": len(taken),
        "seconds a step": round(median, 5),
        "pairs/s": round(cell.batch / median, 3),
        "TFLOP a pair": float(f"{tflop:.4g}"),
        "TFLOP/s": float(f"{speed:.4g}"),
        "of the ceiling, %": round(100 * speed / best, 1),
        "idle, %": round(100 * max(0.0, 1 - busy), 1),
        "peak memory, GB": None if peak is None else round(peak, 2),
    }


def operations(step: Any, device: torch.device, compiled: bool) -> float:
    """TFLOP of a step, counted on one; compiled blocks are run as they were written."""
    # A CPU's kernel of attention is not counted; as two products it is.
    kernel = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
    eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    with FlopCounterMode(display=False) as counter, kernel, eager:
        step()
    return counter.get_total_flops() / 1e12


def idle_share(step: Any, arm: Published | Ours, steps: int = 3) -> float:
    """The share of the time of some steps in which no kernel ran on the GPU."""
    from torch.profiler import ProfilerActivity, profile

    arm.clock.wait()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        began = time.perf_counter()
        for _ in range(steps):
            step()
        arm.clock.wait()
        whole = 1e6 * (time.perf_counter() - began)
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in profiler.events() or ()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]
    return max(0.0, 1 - covered(spans) / whole)


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """How long at least one of some spans lasts: kernels of two streams may run at once.

    >>> covered([(0, 2), (1, 3), (5, 6)])
    4
    """
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        if stop > end:
            total += stop - max(start, end)
            end = stop
    return total


def commands(form: Form, device: torch.device) -> dict[str, Any]:
    """Images a second of `precompute` and `evaluate`."""
    from lit_safety.cli.precompute import precompute
    from lit_safety.evaluation.command import evaluate

    tiny = form is FORMS["tiny"]
    resolution = 32 if tiny else 512
    found: dict[str, Any] = {"model": "toy" if tiny else "sd15", "pixels": resolution}
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        work = Path(folder)
        pipeline = TOY / "pipeline" if tiny else random_pipeline(work / "pipeline", "full")

        def cached(images: int) -> None:
            pairs = random_pairs(work / f"pairs-{images}", images // 2, resolution)
            began.append(time.perf_counter())
            precompute(str(pairs), str(pipeline), str(work / f"cached-{images}"), resolution, device=str(device))

        def evaluated(images: int) -> None:
            prompts = [{"prompt": f"a red kite {n}", "kind": "clean", "seed": n} for n in range(images)]
            began.append(time.perf_counter())
            evaluate(
                pipeline=str(pipeline), prompts=prompts, judge=str(TOY / "judge"), out=str(work / f"report-{images}"),
                clean=None, other_world=True, steps=2 if tiny else 20, batch_size=8, resolution=resolution,
                device=str(device),
            )  # fmt: skip

        for name, command in (("precompute", cached), ("evaluate", evaluated)):
            taken = []
            for images in form.images:
                began: list[float] = []
                command(images)
                taken.append(time.perf_counter() - began[0])
            few, many = form.images
            more = taken[1] - taken[0]
            found[name] = {
                "images/s": round((many - few) / more, 3) if more > 0 else None,
                "seconds": {str(images): round(one, 2) for images, one in zip(form.images, taken, strict=True)},
            }
    _free(device)
    return found


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _compare(cells: list[dict[str, Any]]) -> None:
    """How many times as fast as the published recipe each cell is, where both were measured."""
    published = {
        (cell["model"], cell["batch"]): cell["pairs/s"]
        for cell in cells
        if cell["arm"] == "published" and "pairs/s" in cell
    }
    for cell in cells:
        if "pairs/s" in cell and (known := published.get((cell["model"], cell["batch"]))):
            cell["times the published recipe"] = round(cell["pairs/s"] / known, 3)


COLUMNS = (
    "pairs/s",
    "times the published recipe",
    "TFLOP/s",
    "of the ceiling, %",
    "idle, %",
    "peak memory, GB",
)


def table(found: dict[str, Any]) -> str:
    """The results as a table in Markdown."""
    lines = [
        f"{found['device']}, {found['precision']}, torch {found['torch']}; a matrix product does "
        f"{found['ceiling, TFLOP/s']:g} TFLOP/s; measured in {found['seconds']:g} s",
        "",
        "| cell | " + " | ".join(COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for cell in found["cells"]:
        values = [cell.get("left out", "")] + [""] * (len(COLUMNS) - 1)
        if "left out" not in cell:
            values = ["" if cell.get(name) is None else f"{cell[name]:g}" for name in COLUMNS]
        lines.append(f"| {cell['name']} | " + " | ".join(values) + " |")
    lines.append("")
    for name in ("precompute", "evaluate"):
        rate = found["commands"][name]["images/s"]
        lines.append(f"{name}: {'not measurable' if rate is None else f'{rate:g} images/s'}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
