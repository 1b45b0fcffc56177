import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from lit_safety.core.errors import UserError
from lit_safety.drawing import gallery
from lit_safety.drawing.arms import Arm
from lit_safety.drawing.gallery import DrawingSettings, Gallery, Load, draw_missing
from lit_safety.evaluation.command import evaluate
from lit_safety.judges.toy.judge import ToyJudge

SETTINGS = DrawingSettings(steps=2, guidance=3.0, batch_size=1, device="cpu")


class Ended:
    """A process that has ended with a status."""

    name = "draw 1"

    def __init__(self, exitcode: int) -> None:
        self.exitcode = exitcode

    def join(self) -> None:
        pass


def pipes(count: int):
    return zip(*(multiprocessing.Pipe(duplex=False) for _ in range(count)), strict=True)


def test_ticks_of_all_processes_are_heard() -> None:
    readers, writers = pipes(2)
    for writer, ticks in zip(writers, ([3, 4], [5]), strict=True):
        for tick in ticks:
            writer.send(tick)
        writer.close()
    heard: list[int] = []
    gallery._listen({reader: Ended(0) for reader in readers}, heard.append)
    assert sorted(heard) == [3, 4, 5]


@pytest.mark.parametrize(("says", "status", "expected"), [("disk full", 0, "disk full"), (None, -9, "process 1 ended")])
def test_an_error_or_a_kill_in_one_process_ends_the_drawing(says: str | None, status: int, expected: str) -> None:
    (reader,), (writer,) = pipes(1)
    if says is not None:
        writer.send(says)
    writer.close()
    with pytest.raises(UserError, match=expected):
        gallery._listen({reader: Ended(status)}, lambda _: None)


def test_what_a_dead_process_began_is_removed_and_a_living_one_s_is_not(small_set, tmp_path: Path) -> None:
    gallery = Gallery(tmp_path, "a", {}, small_set, SETTINGS)
    gallery.folder.mkdir()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    dead, living = (gallery.folder / f".00001.png.{pid}.partial" for pid in (ended.pid, os.getpid()))
    for partial in (dead, living):
        partial.write_bytes(b"x")
    gallery.forget_partial()
    assert (dead.exists(), living.exists()) == (False, True)


@pytest.mark.slow
def test_two_processes_draw_what_one_draws_each_image_once(pipeline: Path, small_set, tmp_path: Path) -> None:
    load, ticks = Load(pipeline, Arm(negative_prompt="gun"), SETTINGS), []
    galleries = [Gallery(tmp_path / str(count), "a", {}, small_set, SETTINGS) for count in (1, 2)]
    for count, one in enumerate(galleries, start=1):
        ticks.clear()
        draw_missing(load, one, ticks.append, count)
        assert sum(ticks) == len(small_set)
    one, two = ([Image.open(drawn.path).tobytes() for drawn in one.all()] for one in galleries)
    assert one == two
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.slow
def test_an_error_in_a_process_is_the_command_s_error(pipeline: Path, small_set, tmp_path: Path) -> None:
    """The folder of the images is a file: the process that draws cannot write."""
    one = Gallery(tmp_path, "a", {}, small_set, SETTINGS)
    one.folder.write_bytes(b"in the way")
    with pytest.raises(UserError, match="cannot be written"):
        draw_missing(Load(pipeline, Arm(), SETTINGS), one, lambda _: None, 2)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for left-over processes in /proc")
def test_killed_with_its_processes_and_resumed_is_the_same_report(pipeline: Path, small_set, tmp_path: Path) -> None:
    """SIGKILL while two processes draw: both end with it; the same command then gives the bytes of an unkilled run."""
    torch.manual_seed(0)
    labels, harm = ["knife", "skull", "car", "tree"], {"knife": "violence", "skull": "shocking"}
    ToyJudge(labels=labels, harm=harm, width=8).save_pretrained(tmp_path / "judge")
    rows = [f"{'k ' * (i % 5 + 1)},clean,,,car,0,{i}" for i in range(24)]
    (tmp_path / "p.csv").write_text("\n".join(["prompt,kind,category,concept,benign,held_out,seed", *rows]) + "\n")

    given = {"pipeline": str(pipeline), "prompts": str(tmp_path / "p.csv"), "judge": str(tmp_path / "judge")}
    given |= {"batch_size": 1, "steps": 30, "device": "cpu"}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    metrics = evaluate(**given, out=str(whole))
    assert metrics == json.loads((whole / "metrics.json").read_text())
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "lit_safety", "evaluate", *words, "--out", str(cut), "--processes", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment)
    while len(list(cut.rglob("*.png"))) < 5:
        assert killed.poll() is None, "ended before it was killed"
        time.sleep(0.02)
    children = Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{child}/cmdline").exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{child}/cmdline").exists() for child in children)
    kept = {path: path.stat().st_mtime_ns for path in cut.rglob("*.png")}
    assert 5 <= len(kept) < 24
    assert not (cut / "metrics.json").exists()
    subprocess.run(command, check=True, capture_output=True, env=environment)
    for name in ("metrics.json", "index.html", "table.md", "verdicts.csv", "before_after.png"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "an image that was there is not written again"
    assert json.loads((cut / "metrics.json").read_text())["base"]["n"] == 24
