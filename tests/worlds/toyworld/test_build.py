import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline

from lit_safety.core.errors import UserError
from lit_safety.worlds.toyworld.build import Minutes, build, sheet
from lit_safety.worlds.toyworld.drawing import draw


def test_a_tiny_world_builds_and_a_second_call_finds_it_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, work = tmp_path / "out", tmp_path / "work"
    stages = ["tokenizer", "scenes", "text", "vae", "latents", "unet", "export"]
    build(out, work, stages, Minutes(text=0.01, vae=0.02, unet=0.02), scenes=1000, processes=1)
    capsys.readouterr()
    pipeline = StableDiffusionPipeline.from_pretrained(out / "pipeline")
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert len(draw(pipeline, ["a red cat in the park"], [1], steps=2)) == 1
    written = {file: file.stat().st_mtime_ns for file in out.rglob("*")}
    build(out, work, stages, scenes=1000)
    assert capsys.readouterr().out.count("is there") == len(stages)
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*")} == written
    latents = np.load(work / "latents.npy")
    assert latents.shape == (1000, 8, 8, 8)
    assert 0.8 < latents.astype(np.float32).std() < 1.25


def test_a_sheet_of_drawn_scenes(tmp_path: Path) -> None:
    sheet(tmp_path / "sheets" / "scenes.png", count=4)
    assert (tmp_path / "sheets" / "scenes.png").stat().st_size > 0


def test_bad_requests_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least 1000"):
        build(tmp_path / "out", tmp_path / "work", ["scenes"], scenes=10)
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be made"):
        build(tmp_path / "file" / "out", tmp_path / "work", ["prompts"])


def test_naming_the_commands_needs_no_torch() -> None:
    code = "import sys, lit_safety.worlds.toyworld.build; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
