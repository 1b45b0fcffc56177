"""Runs that go on: longer ones, their schedule, progress bar, config, rows and lock."""

from __future__ import annotations

import csv
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from lit_safety.__main__ import main
from lit_safety.cli.trainer import end_ranks, port_in_use
from lit_safety.core.files import Lock, lock_of
from tests.helpers import noted
from tests.helpers.full_disk import full_disk
from tests.helpers.one_cycle import one_cycle

Arguments = Callable[..., list[str]]
SCHEDULE = "--model.init_args.lr_scheduler.init_args."
BETA = "--model.init_args.objective.init_args.beta"


@pytest.fixture
def fit(command_line: Arguments, tmp_path: Path) -> Callable[..., int]:
    """Runs a `fit` without validation; its learning rates and bar are noted."""
    noted.RATES.clear()
    noted.BAR.clear()

    def run(*more: str) -> int:
        quiet = ["--trainer.limit_val_batches", "0", "--trainer.val_check_interval", "null"]
        save = ["--trainer.callbacks", "[]", "--trainer.callbacks+=lit_safety.callbacks.AtomicModelCheckpoint"]
        save += ["--trainer.callbacks.save_last", "true", "--trainer.callbacks.every_n_train_steps", "1"]
        save += ["--trainer.callbacks.monitor", "step", "--trainer.callbacks.mode", "max"]
        save += [
            "--trainer.callbacks+=tests.helpers.noted.NoteRates",
            "--trainer.callbacks+=tests.helpers.noted.NoteBar",
        ]
        return main(command_line("fit", *quiet, *save, *more))

    return run


@pytest.fixture
def latest(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "scdpo" / "latest"


def test_a_finished_run_is_made_longer(fit: Callable[..., int], latest: Path):
    assert fit("--trainer.max_steps", "4") == 0
    assert fit("--trainer.max_steps", "7", "--ckpt_path", "last") == 0
    assert pytest.approx(one_cycle(4) + one_cycle(7)[4:], rel=1e-6) == noted.RATES
    last = torch.load(latest / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 7


def test_the_length_of_the_schedule_follows_passes_over_the_data(fit: Callable[..., int]):
    """32 pairs in batches of 4, two a step."""
    passes = ["--trainer.max_steps", "-1", "--trainer.max_epochs", "2", "--trainer.accumulate_grad_batches", "2"]
    assert fit(*passes) == 0
    assert pytest.approx(one_cycle(8), rel=1e-6) == noted.RATES


def test_a_schedule_that_ends_before_the_run_is_refused_before_the_first_step(
    fit: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert fit(f"{SCHEDULE}total_steps", "3") == 2
    said = capsys.readouterr().err
    assert "lr_scheduler.init_args.total_steps" in said
    assert said.count("\n") == 1 or "error:" in said.splitlines()[-1]
    assert noted.RATES == []
    assert not list((tmp_path / "runs").rglob("config.yaml"))


def test_the_bar_counts_batches(fit: Callable[..., int]):
    """8 batches an epoch, two a step, also where a run goes on within an epoch."""
    two = ["--trainer.accumulate_grad_batches", "2", f"{SCHEDULE}total_steps", "5"]
    assert fit(*two, "--trainer.max_steps", "2") == 0
    assert noted.BAR == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert fit(*two, "--trainer.max_steps", "3", "--ckpt_path", "last") == 0
    assert noted.BAR[4:] == [(5, 6), (6, 6)]
    assert fit(*two, "--trainer.max_steps", "5", "--ckpt_path", "last") == 0
    assert noted.BAR[6:] == [(7, 8), (8, 8), (1, 2), (2, 2)]


def test_a_resume_says_what_differs_and_keeps_the_config_of_before(
    fit: Callable[..., int], latest: Path, capsys: pytest.CaptureFixture[str]
):
    assert fit("--trainer.max_steps", "2") == 0
    before = (latest / "config.yaml").read_bytes()
    assert fit("--trainer.max_steps", "2", "--ckpt_path", "last", "--model.init_args.lora.init_args.rank", "2") == 2
    assert (latest / "config.yaml").read_bytes() == before
    capsys.readouterr()
    assert fit("--trainer.max_steps", "3", "--ckpt_path", "last", BETA, "7") == 0
    said = capsys.readouterr().out
    assert "model.init_args.objective.init_args.beta: 100.0 -> 7.0" in said
    assert "trainer.max_steps: 2 -> 3" in said
    assert "ckpt_path" not in said
    assert (latest / "config-1.yaml").read_bytes() == before
    held = yaml.safe_load((latest / "config.yaml").read_text())
    assert held["model"]["init_args"]["objective"]["init_args"]["beta"] == 7.0
    assert fit("--trainer.max_steps", "3", "--ckpt_path", "last", BETA, "7") == 0
    assert sorted(path.name for path in latest.glob("config*")) == ["config-1.yaml", "config.yaml"]


def test_a_resume_with_another_optimizer_is_refused_before_the_first_step(
    fit: Callable[..., int], latest: Path, capsys: pytest.CaptureFixture[str]
):
    """Its state is another's: torch would end in the first step with a traceback."""
    assert fit("--trainer.max_steps", "2") == 0
    before = (latest / "config.yaml").read_bytes()
    sgd = ["--model.init_args.optimizer", "torch.optim.SGD"]
    assert fit("--trainer.max_steps", "4", "--ckpt_path", "last", *sgd) == 2
    said = capsys.readouterr().err
    assert "model.init_args.optimizer" in said
    assert "AdamW" in said
    assert (latest / "config.yaml").read_bytes() == before


def test_a_resume_keeps_the_rows_of_before_also_of_other_columns(fit: Callable[..., int], latest: Path):
    logger = ["--trainer.logger", "lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir", "."]
    logger += ["--trainer.logger.name", "", "--trainer.logger.version", "", "--trainer.log_every_n_steps", "1"]
    assert fit(*logger, "--trainer.max_steps", "3") == 0
    file = latest / "metrics.csv"
    before = list(csv.DictReader(file.open()))
    assert [row["step"] for row in before] == ["0", "1", "2"]
    text = file.read_text()
    header, _, rows = text.partition("\n")
    file.write_text(f"{header},zz/own\n" + "".join(f"{row},1\n" for row in rows.splitlines()) + "0,0.1")  # cut short
    assert fit(*logger, "--trainer.max_steps", "5", "--ckpt_path", "last", f"{SCHEDULE}max_lr", "1e-3") == 0
    after = list(csv.DictReader(file.open()))
    assert [row["step"] for row in after] == ["0", "1", "2", "3", "4"]
    assert all(row == {**own, "zz/own": "1"} for row, own in zip(after[:3], before, strict=True))
    assert all(row["zz/own"] == "" and float(row["loss"]) for row in after[3:])


def test_a_run_that_is_going_on_is_not_gone_on_with(
    fit: Callable[..., int], latest: Path, capsys: pytest.CaptureFixture[str]
):
    assert fit("--trainer.max_steps", "1") == 0
    folder = latest.resolve()
    assert not lock_of(folder).exists()
    lock = Lock(lock_of(folder), "busy")
    assert fit("--trainer.max_steps", "2", "--ckpt_path", "auto") == 2
    assert str(folder) in capsys.readouterr().err
    lock.release()
    assert fit("--trainer.max_steps", "2", "--ckpt_path", "auto") == 0


def test_a_damaged_checkpoint_is_one_line_and_another_is_taken(
    fit: Callable[..., int], latest: Path, capsys: pytest.CaptureFixture[str]
):
    assert fit("--trainer.max_steps", "2") == 0
    (latest / "checkpoints" / "last.ckpt").write_bytes(b"PK")
    assert fit("--trainer.max_steps", "3", "--ckpt_path", str(latest / "checkpoints" / "last.ckpt")) == 2
    assert "last.ckpt" in capsys.readouterr().err
    assert fit("--trainer.max_steps", "3", "--ckpt_path", "last") == 0
    assert "last.ckpt" in capsys.readouterr().out.split("note", 1)[1].splitlines()[0]
    assert torch.load(latest / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3


@pytest.mark.parametrize("logger", ["CSVLogger", "TensorBoardLogger"])
def test_a_disk_that_fills_up_under_the_logger_is_one_line(
    command_line: Arguments, logger: str, capsys: pytest.CaptureFixture[str]
):
    quiet = ["--trainer.limit_val_batches", "0", "--trainer.val_check_interval", "null", "--trainer.max_steps", "2"]
    quiet += [
        "--trainer.callbacks",
        "[]",
        "--trainer.callbacks+=tests.helpers.noted.FillDisk",
        "--trainer.log_every_n_steps",
        "1",
    ]
    quiet += ["--trainer.logger", f"lightning.pytorch.loggers.{logger}", "--trainer.logger.save_dir", "."]
    quiet += ["--trainer.enable_checkpointing", "false", "--trainer.enable_progress_bar", "false"]
    with full_disk(1 << 30):
        code = main(command_line("fit", *quiet))
    said = capsys.readouterr().err
    assert code == 2
    assert "Traceback" not in said
    assert "error: " in said.strip().splitlines()[-1]
    assert "runs/scdpo" in said


@pytest.mark.parametrize("per_node", [None, "2"])
def test_tasks_of_slurm_that_the_trainer_would_not_use_are_refused(
    fit: Callable[..., int],
    per_node: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    for name, value in {"NTASKS": "2", "JOB_ID": "1", "JOB_NAME": "run", "PROCID": "0", "LOCALID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    if per_node is not None:
        monkeypatch.setenv("SLURM_NTASKS_PER_NODE", per_node)
    assert fit("--trainer.max_steps", "2") == 2
    assert "2" in capsys.readouterr().err
    assert not list((tmp_path / "runs").rglob("*.ckpt"))


@pytest.mark.slow
def test_a_port_in_use_is_named_and_no_rank_stays(command_line: Arguments, tmp_path: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        two = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
        done = subprocess.run(
            [sys.executable, "-m", "lit_safety", *command_line("fit", *two)],
            env={**os.environ, "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
    assert done.returncode == 2
    assert port in done.stderr
    assert "Traceback" not in done.stderr
    assert not [one for one in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path).encode() in read(one)]


def test_a_taken_port_is_distinguished_from_a_lost_rank():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(RuntimeError) as said:
            torch.distributed.TCPStore("127.0.0.1", taken.getsockname()[1], 2, is_master=True)
    assert port_in_use(said.value)


def test_ranks_that_wait_for_a_gone_one_are_ended():
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
    processes = [
        subprocess.Popen([sys.executable, "-c", words], stdout=subprocess.PIPE)
        for words in ("print(1, flush=True); import time; time.sleep(60)", deaf)
    ]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(launcher=SimpleNamespace(procs=processes)))
    end_ranks(trainer, patience=0.0, mercy=0.5)
    assert [process.poll() for process in processes] == [-signal.SIGTERM, -signal.SIGKILL]


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has ended
        return b""
