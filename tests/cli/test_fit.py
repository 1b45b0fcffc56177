"""fit, validate, predict and resume through `main`, the function behind `python -m lit_safety`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file

from lit_safety.__main__ import main
from lit_safety.adapters.start_from import read_file
from lit_safety.callbacks import AtomicModelCheckpoint
from lit_safety.core.errors import UserError
from lit_safety.data import PreferenceDataModule
from lit_safety.data.format.tar_index import index_tar
from lit_safety.data.reading.batch import PairBatch
from lit_safety.modules import PreferenceModule
from lit_safety.objectives import DiffusionDPO, PairLabels

Arguments = Callable[..., list[str]]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "pytorch_lora_weights.safetensors")


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.fixture
def latest(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "scdpo" / "latest"


def test_fit_writes_what_stock_diffusers_reads(
    command_line: Arguments, latest: Path, tiny_pipeline: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(command_line("fit", "--model.init_args.lora.init_args.alpha", "8")) == 0
    assert "4 pairs x 1 accumulated x 1 ranks = 4 pairs an optimizer step" in capsys.readouterr().out
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    pipe.load_lora_weights(latest / "adapter")
    (adapter,) = pipe.unet.peft_config.values()
    assert (adapter.r, adapter.lora_alpha) == (4, 8)
    assert any(value.abs().max() > 0 for name, value in weights(latest).items() if "lora_B" in name)
    card = (latest / "adapter" / "README.md").read_text()
    for fact in (str(tiny_pipeline), "SCDPO with SafetyConstrainedDPO", "| alpha | 8.0 |", "negative adapter scale"):
        assert fact in card
    assert "val/rewards/margins" in card
    assert (latest / "adapter" / "config.yaml").read_text() == (latest / "config.yaml").read_text()
    assert (latest / "samples" / "step-000004.png").is_file()
    assert list(latest.glob("events.out.tfevents.*"))


@pytest.mark.parametrize(
    ("name", "settings"), [("DMPO", {"beta": 2000.0, "alpha": 0.02, "mu": 0.9}), ("DSPO", {"beta": 0.01, "mu": 0.2})]
)
def test_the_objectives_of_diffusion_sdpos_trainer_are_set_by_yaml(
    command_line: Arguments, latest: Path, tmp_path: Path, name: str, settings: dict[str, float]
):
    objective = {"class_path": f"lit_safety.objectives.{name}", "init_args": settings}
    (tmp_path / "objective.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"objective": objective}}}))
    assert main(command_line("fit", "--config", str(tmp_path / "objective.yaml"), "--trainer.max_steps", "1")) == 0
    written = yaml.safe_load((latest / "config.yaml").read_text())["model"]["init_args"]["objective"]
    assert settings.items() <= written["init_args"].items()
    assert any(value.abs().max() > 0 for key, value in weights(latest).items() if "lora_B" in key)


def test_checkpoints_do_not_carry_the_frozen_model(command_line: Arguments, latest: Path):
    assert main(command_line("fit")) == 0
    checkpoint = torch.load(latest / "checkpoints" / "last.ckpt", weights_only=False)
    assert checkpoint["state_dict"]
    assert all(".policy." in name for name in checkpoint["state_dict"])


def test_batch_8_is_batch_4_accumulated_twice_is_two_ranks_of_4(command_line: Arguments, latest: Path, tmp_path: Path):
    """The same pairs, timesteps and noise in every optimizer step; only sums are rounded in another order.

    Plain SGD, whose update is linear in the gradient: Adam would blow rounding up where a gradient is nearly 0.
    """
    sgd = [
        "--model.init_args.optimizer.class_path",
        "torch.optim.SGD",
        "--model.init_args.optimizer.init_args.lr",
        "0.1",
    ]
    sgd += ["--model.init_args.lr_scheduler", "null"]
    common = [*sgd, "--trainer.gradient_clip_val", "null", "--trainer.limit_val_batches", "0"]
    common += ["--trainer.val_check_interval", "null"]
    whole = command_line("fit", *common, "--data.init_args.batch_size", "8")
    parts = command_line("fit", *common, "--trainer.accumulate_grad_batches", "2")
    ranks = command_line("fit", *common, "--trainer.devices", "2", "--trainer.strategy", "ddp")
    found = []
    for arguments in (whole, parts):
        assert main(arguments) == 0
        found.append(weights(latest))
    done = subprocess.run([sys.executable, "-m", "lit_safety", *ranks], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "4 pairs x 1 accumulated x 2 ranks = 8 pairs" in done.stdout
    found.append(weights(latest))
    update = max(value.abs().max().item() for name, value in found[0].items() if "lora_B" in name)
    assert update > 1e-3
    assert largest_difference(found[0], found[1]) < 1e-3 * update
    assert largest_difference(found[0], found[2]) < 1e-3 * update
    assert len(list((tmp_path / "runs" / "scdpo").glob("20*"))) == 3  # one folder a run, whatever its ranks


@pytest.mark.parametrize("workers", [pytest.param("0", marks=pytest.mark.slow), "2"])
def test_resumed_is_uninterrupted_to_the_bit(command_line: Arguments, latest: Path, workers: str):
    """12 steps in one run, or 5, then to 12: mid-epoch (8 batches an epoch) and across an epoch's end."""
    common = ["--data.init_args.num_workers", workers, "--trainer.val_check_interval", "3"]
    common += ["--model.init_args.lr_scheduler.init_args.total_steps", "12"]
    assert main(command_line("fit", *common, "--trainer.max_steps", "12")) == 0
    uninterrupted = weights(latest)
    every = ["--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint"]
    every += ["--trainer.callbacks.every_n_train_steps", "5", "--trainer.callbacks.save_last", "true"]
    assert main(command_line("fit", *common, *every, "--trainer.max_steps", "5")) == 0
    interrupted = latest.resolve()
    assert main(command_line("fit", *common, "--trainer.max_steps", "12", "--ckpt_path", "last")) == 0
    assert latest.resolve() == interrupted
    assert largest_difference(weights(latest), uninterrupted) == 0.0


def test_runs_never_collide_and_last_is_the_newest(command_line: Arguments, latest: Path):
    folders = []
    for _ in range(2):
        assert main(command_line("fit", "--trainer.max_steps", "1", "--trainer.limit_val_batches", "0")) == 0
        folders.append(latest.resolve())
    assert folders[0] != folders[1]
    assert all((folder / "adapter").is_dir() for folder in folders)


def test_a_run_is_repeated_by_its_own_config(command_line: Arguments, latest: Path):
    assert main(command_line("fit", "--trainer.limit_val_batches", "0")) == 0
    first = latest.resolve()
    files = sorted(path.name for path in first.rglob("*"))
    assert main(["fit", "--config", str(first / "config.yaml")]) == 0
    assert latest.resolve() != first
    assert sorted(path.name for path in first.rglob("*")) == files
    assert (latest / "checkpoints" / "last.ckpt").is_file()
    expected = load_file(first / "adapter" / "pytorch_lora_weights.safetensors")
    assert largest_difference(weights(latest), expected) == 0.0


def test_mixed_precision_keeps_what_is_trained_in_fp32(command_line: Arguments, latest: Path):
    """With the shipped optimizer and clipping, as the README's command for real models has it."""
    assert main(command_line("fit", "--trainer.precision", "bf16-mixed")) == 0
    assert {value.dtype for value in weights(latest).values()} == {torch.float32}


class FaultyGradient(DiffusionDPO):
    """A finite loss whose gradient is not."""

    def preference(self, m: torch.Tensor, labels: PairLabels) -> torch.Tensor:
        loss = super().preference(m, labels)
        loss.register_hook(lambda gradient: gradient * float("nan"))
        return loss


def test_a_gradient_that_is_not_finite_reaches_no_file(tiny_pipeline: Path, pair_shards: Path, tmp_path: Path):
    module = PreferenceModule(str(tiny_pipeline), FaultyGradient(beta=200.0))
    data = PreferenceDataModule(train=str(pair_shards), batch_size=4)
    keep = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=1)
    trainer = Trainer(max_steps=3, accelerator="cpu", logger=False, callbacks=[keep], enable_progress_bar=False)
    with pytest.raises(UserError, match="not finite at samples"):
        trainer.fit(module, data)
    assert not list(tmp_path.rglob("*.ckpt"))


class FaultyFromStep3(DiffusionDPO):
    """Two losses are finite, all others are not."""

    steps = 0

    def preference(self, m: torch.Tensor, labels: PairLabels) -> torch.Tensor:
        self.steps += 1
        return super().preference(m, labels) * (1.0 if self.steps < 3 else float("nan"))


def test_a_loss_that_is_not_finite_leaves_the_last_good_checkpoint(
    tiny_pipeline: Path, pair_shards: Path, tmp_path: Path
):
    module = PreferenceModule(str(tiny_pipeline), FaultyFromStep3(beta=200.0))
    settings = {"save_last": True, "enable_version_counter": False, "monitor": "step", "mode": "max"}
    keep = AtomicModelCheckpoint(tmp_path, every_n_train_steps=1, **settings)
    trainer = Trainer(max_steps=5, accelerator="cpu", logger=False, callbacks=[keep], enable_progress_bar=False)
    with pytest.raises(UserError, match=r"not finite at samples \d{5}, .*the last checkpoint is from before"):
        trainer.fit(module, PreferenceDataModule(train=str(pair_shards), batch_size=2))
    last = torch.load(tmp_path / "last.ckpt", weights_only=False)
    assert last["global_step"] == 2
    assert last["state_dict"]
    assert all(value.isfinite().all() for value in last["state_dict"].values())


def test_an_interrupted_run_keeps_its_folder_and_a_failed_one_leaves_latest_alone(
    command_line: Arguments, latest: Path, monkeypatch: pytest.MonkeyPatch
):
    assert main(command_line("fit", "--trainer.limit_val_batches", "0")) == 0
    first = latest.resolve()
    assert main(command_line("fit", "--data.init_args.train", "/no/such/shards")) == 2
    assert latest.resolve() == first
    step = PreferenceModule.training_step

    def interrupted(self: PreferenceModule, batch: PairBatch, batch_idx: int) -> torch.Tensor:
        if batch_idx == 2:
            raise UserError("the plug was pulled")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(PreferenceModule, "training_step", interrupted)
    assert main(command_line("fit", "--trainer.limit_val_batches", "0")) == 2
    assert latest.resolve() != first
    assert (latest / "config.yaml").is_file()


def test_a_job_that_is_started_again_goes_on_and_is_still_repeated_by_its_config(
    command_line: Arguments, latest: Path, capsys: pytest.CaptureFixture[str]
):
    """`auto`: from the beginning where there is nothing, then in the folder that it finds."""
    job = ["--trainer.limit_val_batches", "0", "--ckpt_path", "auto"]
    assert main(command_line("fit", *job)) == 0
    begun = latest.resolve()
    assert main(command_line("fit", *job, "--trainer.max_steps", "6")) == 0
    assert latest.resolve() == begun
    assert read_file(latest / "checkpoints" / "last.ckpt")["global_step"] == 6
    assert main(command_line("test", "--ckpt_path", "auto")) == 2
    assert "`--ckpt_path auto` does not exist" in capsys.readouterr().err
    assert yaml.safe_load((latest / "config.yaml").read_text())["ckpt_path"] is None
    assert [path.name for path in (latest / "checkpoints").glob("last*")] == ["last.ckpt"]


def test_validate_and_predict_a_checkpoint(command_line: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(command_line("fit")) == 0
    assert main(command_line("validate", "--ckpt_path", "last")) == 0
    assert "val/error/chosen/t00-25" in capsys.readouterr().out
    assert main(command_line("predict", "--ckpt_path", "last", "--trainer.limit_predict_batches", "2")) == 0
    (drawings,) = (tmp_path / "runs" / "scdpo" / "predict").glob("*/drawings")
    assert len(list(drawings.glob("*.png"))) == 8
    assert len((drawings / "prompts-0.jsonl").read_text().splitlines()) == 8


def test_bad_samples_are_named_at_the_end_of_a_run(
    command_line: Arguments, pair_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """One rejected image of 8 pairs is cut short: left out, in the log and in the run's summary."""
    shards = tmp_path / "bad"
    shards.mkdir()
    data = bytearray((pair_shards / "shard-000000.tar").read_bytes())
    offset, size = index_tar(pair_shards / "shard-000000.tar").samples[3].members["rejected.png"]
    data[offset + size // 2 : offset + size] = bytes(size - size // 2)
    (shards / "a.tar").write_bytes(bytes(data))
    common = ["--data.init_args.train", str(shards), "--trainer.limit_val_batches", "0", "--trainer.max_steps", "2"]
    assert main(command_line("fit", *common)) == 2
    assert "a.tar: sample '00003': rejected: the PNG image cannot be decoded" in capsys.readouterr().err
    assert main(command_line("fit", *common, "--data.init_args.on_bad_sample", "skip")) == 0
    said = capsys.readouterr()
    assert f"left out 1 bad samples; first: {shards}/a.tar: sample '00003': rejected: the PNG image" in said.out


@pytest.mark.slow
def test_two_ranks_resume_to_the_bit(command_line: Arguments, latest: Path):
    """6 steps of two ranks in one run, or 3 of them, then to 6; 4 steps are a pass."""
    common = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.limit_val_batches", "0"]
    common += ["--trainer.accelerator", "cpu", "--data.init_args.num_workers", "1"]
    common += ["--model.init_args.lr_scheduler.init_args.total_steps", "6"]

    def run(*more: str) -> None:
        command = [sys.executable, "-m", "lit_safety", *command_line("fit", *common, *more)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    run("--trainer.max_steps", "6")
    uninterrupted = weights(latest)
    every = ["--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint"]
    every += ["--trainer.callbacks.every_n_train_steps", "3", "--trainer.callbacks.save_last", "true"]
    run(*every, "--trainer.max_steps", "3")
    run("--trainer.max_steps", "6", "--ckpt_path", "last")
    assert largest_difference(weights(latest), uninterrupted) == 0.0
