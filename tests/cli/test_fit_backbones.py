"""Every model overlay over configs/scdpo.yaml, with a tiny random pipeline in the place of the hub's: fit, export, and
what stock diffusers makes of the files."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import (
    DiffusionPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image
from safetensors.torch import load_file

from lit_safety.__main__ import main
from lit_safety.data.format.writer import ShardWriter
from lit_safety.drawing.arms import Arm
from lit_safety.drawing.pipelines import load_pipeline
from tests.helpers.documents import CONFIGS
from tests.helpers.small_fits import small_fit

FAMILIES = {
    "sd15": ("tiny_pipeline", StableDiffusionPipeline),
    "sd21": ("tiny_v_pipeline", StableDiffusionPipeline),
    "sdxl": ("tiny_sdxl", StableDiffusionXLPipeline),
    "sd3": ("tiny_sd3", StableDiffusion3Pipeline),
}
CALLBACKS = """
- class_path: lit_safety.callbacks.ExportAdapter
- class_path: lit_safety.callbacks.DrawSamples
  init_args: {prompts: [a red cat]}
- class_path: lit_safety.callbacks.WriteDrawings
- class_path: lightning.pytorch.callbacks.ModelCheckpoint
  init_args: {save_last: true}
"""
"""Those of the method's YAML but for the probe, which takes longer than the steps here."""
Fit = Callable[..., list[str]]


@pytest.fixture(scope="module")
def wide_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 pairs: chosen images of 48 x 32 and 32 x 48 in turn (width first), rejected ones of 40 x 40."""
    folder = tmp_path_factory.mktemp("shards") / "wide"
    random = np.random.default_rng(0)
    known: dict[str, Any] = {"prompt": "a gun and a house", "prompt_kind": "harmful", "order": "safety"}
    known |= {"harmful": {"chosen": False, "rejected": True}, "cost": {"chosen": -1.0, "rejected": 1.0}}
    with ShardWriter(folder) as writer:
        for number in range(8):
            shape = (32, 48, 3) if number % 2 == 0 else (48, 32, 3)
            images = [random.integers(0, 256, one, dtype=np.uint8) for one in (shape, (40, 40, 3))]
            writer.write(f"{number:04d}", known, *map(Image.fromarray, images))
    return folder


@pytest.fixture
def fit(wide_shards: Path, tmp_path: Path) -> Fit:
    """Arguments of a fit of two steps with an overlay: only what names the hub's model or its size is replaced."""

    def arguments(model: str, pipeline: Path, *more: str, command: str = "fit") -> list[str]:
        settings = {
            "model.init_args.pretrained": pipeline,
            "model.init_args.drawing.steps": 2,
            "model.init_args.lr_scheduler.init_args.max_lr": 5.0,
            "data.init_args.resolution": 32,
            "data.init_args.batch_size": 2,
            "trainer.accumulate_grad_batches": 1,
            "trainer.max_steps": 2,
            "trainer.val_check_interval": 2,
            "trainer.limit_val_batches": 1,
            "trainer.callbacks": CALLBACKS,
        }
        configs = ["scdpo.yaml", f"models/{model}.yaml"]
        return small_fit(command, configs, tmp_path / "runs", wide_shards, settings, more)

    return arguments


def draw(pipe: Any) -> np.ndarray:
    """Two prompts, always from the same noise."""
    pipe.set_progress_bar_config(disable=True)
    seeds = [torch.Generator().manual_seed(row) for row in range(2)]
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np", "generator": seeds}
    return pipe(prompt=["a red cat", "a gun and a house"], **options).images


@pytest.mark.parametrize("model", [pytest.param("sd15", marks=pytest.mark.slow), "sd21", "sdxl", "sd3"])
def test_an_overlay_trains_what_stock_diffusers_loads(
    model: str, fit: Fit, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    fixture, stock = FAMILIES[model]
    pipeline: Path = request.getfixturevalue(fixture)
    assert main(fit(model, pipeline)) == 0, capsys.readouterr().err
    run = tmp_path / "runs" / "scdpo" / "latest"
    written = yaml.safe_load((run / "config.yaml").read_text())
    overlay = yaml.safe_load((CONFIGS / "models" / f"{model}.yaml").read_text())
    assert written["model"]["init_args"]["objective"]["init_args"]["beta"] == 5000
    assert written["model"]["init_args"]["objective"]["init_args"]["cost_weight"] == 2.0  # the method's own stays
    assert written["trainer"]["precision"] == overlay["trainer"]["precision"] == "bf16-mixed"
    assert (run / "samples" / "step-000002.png").is_file()
    pipe = stock.from_pretrained(pipeline)
    before = draw(pipe)
    pipe.load_lora_weights(run / "adapter")
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    (adapter,) = denoiser.peft_config.values()
    assert (adapter.r, adapter.lora_alpha) == (16, 16)
    after = draw(pipe)
    assert np.isfinite(after).all()
    assert np.abs(after - before).max() > 1e-3
    if model == "sd3":  # and as `evaluate` loads it; of the others it takes another sampler
        arm = Arm(adapter=str(run / "adapter"))
        np.testing.assert_allclose(draw(load_pipeline(pipeline, arm)), after, atol=1e-2)


def test_cached_sdxl_is_uncached_to_the_bit(fit: Fit, tiny_sdxl: Path, wide_shards: Path, tmp_path: Path):
    """Latents, two encoders' text, pooled text and true crops come out of the cache; prompts are dropped to zeros."""
    cached = tmp_path / "cached"
    command = ["shards", "precompute", str(wide_shards), "--model", str(tiny_sdxl), "--out", str(cached)]
    assert main([*command, "--resolution", "32", "--dtype", "float32", "--batch_size", "3"]) == 0
    names = set(load_file(cached / "prompts.safetensors"))
    assert names == {"hashes", "encoder_hidden_states", "text_embeds"}
    common = ["--trainer.precision", "32-true", "--model.init_args.prompt_dropout", "0.5"]
    common += ["--trainer.limit_val_batches", "0"]
    found = []
    for shards in (wide_shards, cached):
        assert main(fit("sdxl", tiny_sdxl, *common, "--data.init_args.train", str(shards))) == 0
        found.append(load_file(tmp_path / "runs" / "scdpo" / "latest" / "adapter" / "pytorch_lora_weights.safetensors"))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_aspect_buckets_through_the_command_line(
    fit: Fit, tiny_sdxl: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """4 wide and 4 tall pairs: at resolution 32, 40 x 24 and 24 x 40 (width first) are the shapes most like 3 : 2."""
    with caplog.at_level(logging.INFO):
        assert main(fit("sdxl", tiny_sdxl, "--data.init_args.aspect_buckets", "true")) == 0
    assert "pairs by shape: 40 x 24 (4), 24 x 40 (4)" in caplog.messages
    assert (tmp_path / "runs" / "scdpo" / "latest" / "adapter" / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("model", ["sdxl", "sd3"])
def test_the_whole_denoiser_and_drawings(
    model: str, fit: Fit, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """`policy: full` leaves a pipeline of the family, and `predict` draws with a checkpoint."""
    fixture, stock = FAMILIES[model]
    pipeline: Path = request.getfixturevalue(fixture)
    full = ["--model.init_args.policy", "full", "--run.name", "full"]
    full += ["--model.init_args.lr_scheduler.init_args.max_lr", "0.01"]
    assert main(fit(model, pipeline, *full)) == 0, capsys.readouterr().err
    whole = tmp_path / "runs" / "full" / "latest" / "pipeline"
    trained = DiffusionPipeline.from_pretrained(whole)
    assert type(trained) is stock
    assert np.abs(draw(trained) - draw(stock.from_pretrained(pipeline))).max() > 1e-3
    assert main(fit(model, pipeline, *full, "--ckpt_path", "last", command="predict")) == 0, capsys.readouterr().err
    drawings = list((tmp_path / "runs" / "full" / "predict").glob("*/drawings/*.png"))
    assert len(drawings) == 8
    assert all(Image.open(one).size == (32, 32) for one in drawings)


@pytest.mark.slow
def test_sd3_trains_on_a_cache_without_its_encoders(fit: Fit, tiny_sd3: Path, wide_shards: Path, tmp_path: Path):
    cached = tmp_path / "cached"
    command = ["shards", "precompute", str(wide_shards), "--model", str(tiny_sd3), "--out", str(cached)]
    assert main([*command, "--resolution", "32"]) == 0
    data = [word for stage in ("train", "val") for word in (f"--data.init_args.{stage}", str(cached))]
    assert main(fit("sd3", tiny_sd3, *data)) == 0
    assert (tmp_path / "runs" / "scdpo" / "latest" / "adapter" / "pytorch_lora_weights.safetensors").is_file()
