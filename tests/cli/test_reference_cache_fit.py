"""Training on a reference cache through the real command line."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lit_safety.__main__ import main

Arguments = Callable[..., list[str]]
OBJECTIVE = "--model.init_args.objective"
DROPOUT = ["--model.init_args.prompt_dropout", "0.3"]


@pytest.fixture(scope="module")
def cached(tiny_pipeline: Path, pair_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pair_shards` as latents, mirrored ones too, with 3 draws of the reference and all that can be stored of them."""
    out = tmp_path_factory.mktemp("reference") / "pairs"
    command = ["shards", "precompute", str(pair_shards), "--model", str(tiny_pipeline), "--out", str(out)]
    command += ["--flip", "true", "--dtype", "float32", "--batch_size", "3", "--reference_draws", "3"]
    assert main([*command, "--reference_dropout", "true", "--reference_predictions", "true"]) == 0
    return out


@pytest.fixture(scope="module")
def errors_only(tiny_pipeline: Path, pair_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without mirrored latents, empty prompts and predictions."""
    out = tmp_path_factory.mktemp("errors") / "pairs"
    command = ["shards", "precompute", str(pair_shards), "--model", str(tiny_pipeline), "--out", str(out)]
    assert main([*command, "--reference_draws", "2"]) == 0
    return out


def on_cache(cached: Path) -> list[str]:
    return [word for stage in ("train", "val", "test") for word in (f"--data.init_args.{stage}", str(cached))]


def weights(tmp_path: Path) -> dict[str, torch.Tensor]:
    return load_file(tmp_path / "runs" / "scdpo" / "latest" / "adapter" / "pytorch_lora_weights.safetensors")


def test_a_cached_reference_trains_as_the_same_draws_with_the_reference_run(
    command_line: Arguments, cached: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Mirrored pairs, dropped prompts, the anchor on clean ones, several passes, batches other than the cache's."""
    common = [*on_cache(cached), *DROPOUT, "--data.init_args.flip", "true", "--trainer.max_steps", "6"]
    assert main(command_line("fit", *common, "--data.init_args.num_workers", "1")) == 0
    out = capsys.readouterr().out
    assert "the reference's errors at 3 fixed draws a pair; it is not run" in out
    start = re.search(r"start +\|m\| is at most (\S+) before the first update \(limit 0.05\)", out)
    assert start is not None
    assert float(start[1]) < 1e-3
    from_cache = weights(tmp_path)
    assert main(command_line("fit", *common, "--model.class_path", "tests.helpers.runs_reference.RunsReference")) == 0
    run = weights(tmp_path)
    assert from_cache.keys() == run.keys()
    moved = max(float(value.abs().max()) for name, value in run.items() if "lora_B" in name)
    for name, value in run.items():
        # Batches of 3 there and of 4 here round errors apart by a last digit, and Adam divides by small gradients.
        torch.testing.assert_close(from_cache[name], value, rtol=0, atol=5e-3 * moved)


def test_fresh_draws_differ_and_need_nothing_of_the_reference_cache(
    command_line: Arguments, errors_only: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    fresh = ["--data.init_args.use_reference", "false", *DROPOUT]
    assert main(command_line("fit", *on_cache(errors_only), *fresh)) == 0
    out = capsys.readouterr().out
    assert "fixed draws" not in out
    assert "|m| is at most" not in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "SafetyConstrainedDPO needs the reference's predictions for anchor_weight"),
        ([f"{OBJECTIVE}.init_args.anchor_weight", "0", *DROPOUT], "--reference_dropout true"),
        (
            [f"{OBJECTIVE}", "lit_safety.objectives.DiffusionDPO", f"{OBJECTIVE}.init_args.anchor_weight", "1"],
            "DiffusionDPO needs the reference's predictions for anchor_weight",
        ),
        ([f"{OBJECTIVE}", "lit_safety.objectives.DSPO"], "data.init_args.use_reference"),
    ],
)
def test_what_the_cache_does_not_hold_is_refused_by_name(
    options: list[str], message: str, command_line: Arguments, errors_only: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(command_line("fit", *on_cache(errors_only), *options)) == 2
    assert message in capsys.readouterr().err


def test_predictions_of_clean_prompts_are_not_enough_for_dspo(
    command_line: Arguments, cached: Path, capsys: pytest.CaptureFixture[str]
):
    dspo = [f"{OBJECTIVE}", "lit_safety.objectives.DSPO"]
    assert main(command_line("fit", *on_cache(cached), *dspo)) == 2
    assert "DSPO" in (message := capsys.readouterr().err)
    assert "use_reference" in message
    assert main(command_line("fit", *on_cache(cached), *dspo, "--data.init_args.use_reference", "false")) == 0


def test_a_reference_cache_of_another_denoiser_is_refused(
    command_line: Arguments,
    cached: Path,
    tiny_pipeline: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    other = tmp_path / "other"
    shutil.copytree(tiny_pipeline, other)
    file = next((other / "unet").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    assert main(command_line("fit", *on_cache(cached), "--model.init_args.pretrained", str(other))) == 2
    message = capsys.readouterr().err
    assert f"the reference cache was made by {tiny_pipeline} (unet " in message
    assert f"this run's model is {other} (unet " in message


def test_a_margin_above_the_limit_ends_the_run_before_the_first_update(
    command_line: Arguments, cached: Path, capsys: pytest.CaptureFixture[str]
):
    """Rounding alone: the cache was made in fp32, the run computes in bf16, and a beta of 10^6 makes a margin of it."""
    huge = ["--model.init_args.objective.init_args.beta", "1e6", "--trainer.callbacks", "[]"]
    huge += ["--trainer.precision", "bf16-mixed"]
    assert main(command_line("fit", *on_cache(cached), *huge)) == 2
    assert "before the first update |m| reaches" in (message := capsys.readouterr().err)
    assert "`model.init_args.speed.margin_limit` 0.05" in message
    assert "--reference_precision bf16-mixed" in message


def test_a_module_with_other_timesteps_is_refused(
    command_line: Arguments, cached: Path, capsys: pytest.CaptureFixture[str]
):
    late = ["--model.class_path", "tests.helpers.runs_reference.LateTimesteps", "--trainer.callbacks", "[]"]
    assert main(command_line("fit", *on_cache(cached), *late)) == 2
    assert "the reference cache was made at timestep" in capsys.readouterr().err


def test_the_whole_denoiser_is_trained_without_a_frozen_copy(
    command_line: Arguments, cached: Path, capsys: pytest.CaptureFixture[str]
):
    full = ["--model.init_args.policy", "full", "--model.init_args.optimizer.init_args.lr", "1e-5"]
    full += ["--model.class_path", "tests.helpers.runs_reference.NoCopy", "--model.init_args.lr_scheduler", "null"]
    assert main(command_line("fit", *on_cache(cached), *full, "--trainer.callbacks", "[]")) == 0
    assert "before the first update (limit 0.05)" in capsys.readouterr().out


@pytest.mark.slow
def test_compiled_and_selective_on_the_cache(
    command_line: Arguments, cached: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """All options of a step at once; the cheapest backend compiles."""
    selective = "{class_path: lit_safety.modules.SelectiveBackward, init_args: {threshold: 10, least: 0.5}}"
    speed = ["--model.init_args.speed", f"{{compile: eager, gradient_checkpointing: true, selective: {selective}}}"]
    blocks = ["--model.init_args.lora.init_args.blocks", "[mid_block, up_blocks]"]
    assert main(command_line("fit", *on_cache(cached), *speed, *blocks, "--trainer.max_steps", "3")) == 0
    assert "before the first update (limit 0.05)" in capsys.readouterr().out
    found = weights(tmp_path)
    assert not any("down_blocks" in name for name in found)
    assert any(value.abs().max() > 0 for name, value in found.items() if "lora_B" in name)
