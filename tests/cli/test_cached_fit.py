"""Training from cached shards through the real command line."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lit_safety.__main__ import main
from lit_safety.data.format.writer import ShardWriter
from tests.helpers.documents import ROOT

Arguments = Callable[..., list[str]]


@pytest.fixture(scope="module")
def cached(tiny_pipeline: Path, pair_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pair_shards` as latents in float32, mirrored ones too, and no images."""
    out = tmp_path_factory.mktemp("cached") / "pairs"
    command = ["shards", "precompute", str(pair_shards), "--model", str(tiny_pipeline), "--out", str(out)]
    assert main([*command, "--dtype", "float32", "--flip", "true", "--batch_size", "3"]) == 0
    return out


def on_cache(cached: Path) -> list[str]:
    return [word for stage in ("train", "val", "test") for word in (f"--data.init_args.{stage}", str(cached))]


def weights(tmp_path: Path) -> dict[str, torch.Tensor]:
    return load_file(tmp_path / "runs" / "scdpo" / "latest" / "adapter" / "pytorch_lora_weights.safetensors")


def test_cached_is_uncached_to_the_bit(
    command_line: Arguments,
    cached: Path,
    tiny_pipeline: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    """Mirrored pairs, dropped prompts, and batches that the cache was not made in (3 pairs there, 4 and 1 here)."""
    common = ["--data.init_args.flip", "true", "--model.init_args.prompt_dropout", "0.3"]
    common += ["--data.init_args.val_batch_size", "1", "--trainer.limit_val_batches", "2"]
    assert main(command_line("fit", *common)) == 0
    from_images = weights(tmp_path)
    assert main(command_line("fit", *common, *on_cache(cached), "--data.init_args.num_workers", "1")) == 0
    from_cache = weights(tmp_path)
    assert from_images.keys() == from_cache.keys()
    assert all(torch.equal(from_images[name], from_cache[name]) for name in from_images)
    assert f"cache   data.init_args.train: latents and text by {tiny_pipeline} (" in capsys.readouterr().out


def test_a_cache_needs_neither_vae_nor_text_encoder(
    command_line: Arguments, cached: Path, tiny_pipeline: Path, tmp_path: Path
):
    bare = tmp_path / "bare"
    shutil.copytree(tiny_pipeline, bare)
    for part in ("vae", "text_encoder"):
        for file in (bare / part).glob("*.safetensors"):
            file.unlink()
    shutil.rmtree(bare / "tokenizer")
    without_drawing = ["--trainer.callbacks", "[]", "--model.init_args.pretrained", str(bare)]
    assert main(command_line("fit", *on_cache(cached), *without_drawing)) == 0


def test_a_cache_of_another_model_is_refused_before_weights_are_read(
    command_line: Arguments,
    cached: Path,
    tiny_pipeline: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    other = tmp_path / "other"
    shutil.copytree(tiny_pipeline, other)
    file = next((other / "vae").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    next((other / "unet").glob("*.safetensors")).write_bytes(b"no weights at all")
    assert main(command_line("fit", *on_cache(cached), "--model.init_args.pretrained", str(other))) == 2
    message = capsys.readouterr().err
    assert f"the cache was made by {tiny_pipeline} (vae " in message
    assert f"this run's model is {other} (vae " in message


def test_a_cache_of_another_resolution_is_refused(
    command_line: Arguments, cached: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(command_line("fit", *on_cache(cached), "--data.init_args.resolution", "64")) == 2
    assert "made at 32 x 32 pixels" in (message := capsys.readouterr().err)
    assert "data.init_args.resolution is 64" in message


def test_prompts_that_are_too_long_are_counted_in_the_summary(
    command_line: Arguments, tiny_pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The tiny text encoder reads 16 tokens; each of 2 pairs has 20 words and the other 6 are short."""
    long = ["a red cat and a gun " * 4 + word for word in ("house", "cat")]
    shards = tmp_path / "long"
    with ShardWriter(shards) as writer:
        for number, prompt in enumerate([*long, *["a cat"] * 6]):
            known = {"prompt": prompt, "prompt_kind": "clean", "order": "safety", "cost": {"chosen": -1, "rejected": 1}}
            known["harmful"] = {"chosen": False, "rejected": True}
            writer.write(f"{number}", known, Image.new("RGB", (32, 32)), Image.new("RGB", (32, 32), "red"))
    where = [f"--data.init_args.{stage}" for stage in ("train", "val", "test")]
    data = [word for key in where for word in (key, str(shards))]
    assert main(command_line("fit", *data, "--trainer.max_steps", "2", "--trainer.limit_val_batches", "0")) == 0
    assert "2 prompts are longer" in capsys.readouterr().out
    out = tmp_path / "cached"
    assert main(["shards", "precompute", str(shards), "--model", str(tiny_pipeline), "--out", str(out)]) == 0
    assert f"2 prompts are too long for the text encoder and were cut; first: {long[0]!r}" in (capsys.readouterr().out)
    assert main(["shards", "validate", str(out)]) == 0
    assert "2 prompts are longer" in capsys.readouterr().out
    assert main(["shards", "inspect", str(out)]) == 0
    assert "latents only" in (shown := capsys.readouterr().out)
    assert "2 prompts are longer" in shown


@pytest.mark.parametrize("workers", [pytest.param("0", marks=pytest.mark.slow), "2"])
def test_resumed_from_a_cache_is_uninterrupted_to_the_bit(
    command_line: Arguments, cached: Path, tmp_path: Path, workers: str
):
    """6 steps, or 3, then to 6 (4 batches a pass), on mirrored pairs of one kind with dropped prompts."""
    common = [*on_cache(cached), "--data.init_args.flip", "true", "--model.init_args.prompt_dropout", "0.3"]
    common += ["--data.init_args.num_workers", workers, "--trainer.val_check_interval", "2"]
    common += ["--trainer.limit_val_batches", "1", "--data.init_args.kinds", "[harmful]"]
    common += ["--model.init_args.lr_scheduler.init_args.total_steps", "6"]
    assert main(command_line("fit", *common, "--trainer.max_steps", "6")) == 0
    uninterrupted = weights(tmp_path)
    every = ["--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint"]
    every += ["--trainer.callbacks.every_n_train_steps", "3", "--trainer.callbacks.save_last", "true"]
    assert main(command_line("fit", *common, *every, "--trainer.max_steps", "3")) == 0
    assert main(command_line("fit", *common, "--trainer.max_steps", "6", "--ckpt_path", "last")) == 0
    resumed = weights(tmp_path)
    assert all(torch.equal(resumed[name], uninterrupted[name]) for name in uninterrupted)


@pytest.mark.parametrize("command", ["fit", "precompute", "evaluate", "from a cache"])
def test_no_command_takes_a_tokenizer_without_its_vocabulary(
    command: str,
    command_line: Arguments,
    cached: Path,
    pair_shards: Path,
    tiny_pipeline: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    """transformers makes one of two words, for which all prompts are alike."""
    pipeline = Path(shutil.copytree(tiny_pipeline, tmp_path / "pipe"))
    (pipeline / "tokenizer" / "tokenizer.json").unlink()
    model = ["--model.init_args.pretrained", str(pipeline)]
    repository = ROOT
    words = {
        "fit": lambda: command_line("fit", *model),
        "from a cache": lambda: command_line("fit", *model, *on_cache(cached)),
        "precompute": lambda: [
            "shards", "precompute", str(pair_shards), "--model", str(pipeline), "--out", str(tmp_path / "out"),
        ],
        "evaluate": lambda: [
            "evaluate", "--pipeline", str(pipeline), "--prompts", str(repository / "data/toyworld/prompts/test.csv"),
            "--judge", str(repository / "data/toyworld/judge"), "--out", str(tmp_path / "out"), "--device", "cpu",
            "--other_world", "true",
        ],
    }  # fmt: skip
    assert main(words[command]()) == 2
    assert "tokenizer/tokenizer.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["vae", "text_encoder"])
def test_a_run_from_a_cache_that_draws_looks_for_what_draws_before_its_first_step(
    missing: str,
    command_line: Arguments,
    cached: Path,
    tiny_pipeline: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    pipeline = Path(shutil.copytree(tiny_pipeline, tmp_path / "pipe"))
    for file in (pipeline / missing).glob("*.safetensors"):
        file.unlink()
    model = ["--model.init_args.pretrained", str(pipeline)]
    assert main(command_line("fit", *model, *on_cache(cached))) == 2
    assert f"{missing}" in capsys.readouterr().err
    assert not list((tmp_path / "runs").rglob("last.ckpt"))
