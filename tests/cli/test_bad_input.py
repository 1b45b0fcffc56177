"""Bad input: one line that names the key or file and the way out, exit status 2, nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lit_safety.__main__ import main
from lit_safety.modules import PreferenceModule

Arguments = Callable[..., list[str]]


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run what must fail; returns the one line of complaint."""
    assert main(arguments) == 2
    complaints = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(complaints) == 1
    return complaints[0]


@pytest.mark.parametrize(
    ("more", "names"),
    [
        (["--model.init_args.objective.init_args.bta", "3"], ["model.init_args.objective", "'bta'"]),
        (["--model.init_args.optimizer.init_args.lrr", "3"], ["`model.init_args.optimizer`", "'lrr'"]),
        (["--model.init_args.lora.init_args.rank", "x"], ["model.init_args.lora.init_args.rank", "int"]),
        (["--model.init_args.objective.init_args.beta", "0"], ["beta must be above 0"]),
        (["--model.class_path", "lit_safety.modules.Nope"], ["`model`", "Nope"]),
        (["--data.init_args.train", "/no/such/shards"], ["data.init_args.train", "/no/such/shards"]),
        (["--data.init_args.train", "[]"], ["data.init_args.train", "empty"]),
        (["--data.init_args.num_workers", "9"], ["data.init_args.num_workers", "9", "4"]),
        (["--model.init_args.pretrained", "/no/such/pipeline"], ["/no/such/pipeline"]),
        (["--ckpt_path", "/no/such.ckpt"], ["--ckpt_path /no/such.ckpt"]),
        (["--ckpt_path", "last"], ["--ckpt_path last", "train first"]),
        (["--ckpt_path", "autosave.ckpt"], ["--ckpt_path autosave.ckpt", "does not exist"]),
        (["--model.init_args.lora.init_args.target_modules", "[to_nowhere]"], ["target_modules", "to_nowhere"]),
        (["--config", "/no/such.yaml"], ["/no/such.yaml"]),
        (["--trainer.precision", "16-mixed"], ["trainer.precision: 16-mixed", "CPU", "bf16-mixed"]),
        (["--trainer.precision", "bf16-true"], ["trainer.precision", "bf16-mixed"]),
        (["--seed_everything", "true"], ["seed_everything", "number"]),
    ],
)
def test_one_line_and_nothing_left_behind(
    more: list[str], names: list[str], command_line: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    complaint = refused(command_line("fit", *more), capsys)
    for name in names:
        assert name in complaint
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("command", ["test", "predict"])
def test_commands_about_a_checkpoint_ask_for_one(
    command: str, command_line: Arguments, capsys: pytest.CaptureFixture[str]
):
    assert "--ckpt_path" in refused(command_line(command), capsys)


def test_an_unknown_key_is_reported_before_anything_is_read(
    command_line: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Everything else is wrong too, and the key comes first."""
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("model:\n  init_args:\n    objectiv: 3\n")
    wrong = ["--data.init_args.train", "/no/such/shards", "--model.init_args.pretrained", "/no/such/pipeline"]
    assert "'objectiv'" in refused(command_line("fit", *wrong, "--config", str(overlay)), capsys)


def test_an_unknown_key_of_the_optimizer_is_reported_with_its_path(
    command_line: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("model: {init_args: {optimizer: {class_path: torch.optim.AdamW, init_args: {lrr: 3}}}}\n")
    complaint = refused(command_line("fit", "--config", str(overlay)), capsys)
    assert "`model.init_args.optimizer`: Option 'lrr' is not accepted" in complaint


def test_no_write_permission(command_line: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A file at the folder's path represents all reasons why a folder cannot be made (root may write anywhere)."""
    (tmp_path / "occupied").write_text("")
    complaint = refused(command_line("fit", "--run.root", str(tmp_path / "occupied")), capsys)
    assert "occupied" in complaint
    assert "run.root" in complaint


def test_a_checkpoint_of_another_adapter(command_line: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(command_line("fit", "--trainer.limit_val_batches", "0")) == 0
    lora = "--model.init_args.lora.init_args."
    for setting in (["rank", "2"], ["target_modules", "[to_q]"]):
        other = command_line("fit", "--ckpt_path", "last", f"{lora}{setting[0]}", setting[1])
        assert "checkpoint's weights" in refused(other, capsys)
    assert (tmp_path / "runs" / "scdpo" / "latest" / "checkpoints" / "last.ckpt").is_file()


def test_unknown_command(capsys: pytest.CaptureFixture[str]):
    assert "'fitt'" in refused(["fitt"], capsys)


def test_out_of_memory_is_one_line(
    command_line: Arguments, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """An allocator really refuses, in the middle of a step: 4 PiB are more than any processor can address."""
    monkeypatch.setattr(PreferenceModule, "errors", lambda self, batch: torch.empty(1 << 50, dtype=torch.float32))
    complaint = refused(command_line("fit", "--trainer.callbacks", "[]", "--trainer.logger", "false"), capsys)
    for name in ("out of memory", "data.init_args.batch_size", "trainer.accumulate_grad_batches"):
        assert name in complaint
