"""How commands end before their end: signals, processes that are killed, a machine that refuses. One line each."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_safety import __main__ as program
from lit_safety.__main__ import main
from lit_safety.core.endings import explain, stopped_by
from lit_safety.core.errors import Terminated
from lit_safety.core.processes import check_launcher, each
from lit_safety.core.progress import Lines, progress
from lit_safety.core.text import read_text
from lit_safety.drawing.threads import each_batch
from tests.helpers.documents import TOYWORLD

SIGNALS = {signal.SIGINT: ("Ctrl-C", 130), signal.SIGTERM: ("SIGTERM", 143)}
Arguments = Callable[..., list[str]]


def complaints(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(("error: ", "stopped by "))]


def raise_signal(number: int) -> Callable[..., None]:
    def work(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), number)
        time.sleep(5)

    return work


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_any_command_in_one_line(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    handlers = [signal.getsignal(one) for one in SIGNALS]
    monkeypatch.setattr(program, "_run", raise_signal(number))
    name, status = SIGNALS[signal.Signals(number)]
    assert main(["shards", "validate"]) == status
    assert complaints(capsys.readouterr().err) == [f"stopped by {name}"]
    assert [signal.getsignal(one) for one in SIGNALS] == handlers


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_a_fit_before_its_first_step(
    number: int, command_line: Arguments, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    """While weights and data load there is nothing to save; nothing is left behind."""
    monkeypatch.setattr("lit_safety.modules.SCDPO.configure_policy", raise_signal(number), raising=True)
    name, status = SIGNALS[signal.Signals(number)]
    assert main(command_line("fit")) == status
    assert complaints(capsys.readouterr().err) == [f"stopped by {name}"]
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("command", ["validate", "predict", "test"])
def test_a_signal_ends_the_trainer_s_other_commands(
    command: str, command_line: Arguments, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.setattr("lit_safety.modules.SCDPO.configure_policy", raise_signal(signal.SIGTERM))
    checkpoint = [] if command == "validate" else ["--ckpt_path", str(tmp_path / "a.ckpt")]
    torch.save({"state_dict": {}}, tmp_path / "a.ckpt")
    assert main(command_line(command, *checkpoint, "--trainer.callbacks", "[]", "--trainer.logger", "false")) == 143
    assert complaints(capsys.readouterr().err) == ["stopped by SIGTERM"]


def test_lightning_s_exit_after_ctrl_c_is_known() -> None:
    def interrupted() -> None:
        try:
            raise Terminated
        except KeyboardInterrupt:
            sys.exit(1)

    assert stopped_by(raised(interrupted)) == signal.SIGTERM
    assert stopped_by(SystemExit(3)) is None
    assert stopped_by(ValueError()) is None


def pipe() -> Any:
    class Pipe:
        def __init__(self) -> None:
            self.components = {"unet": torch.nn.Linear(2, 2)}

    return Pipe()


@pytest.mark.parametrize("workers", [1, 3])
def test_a_signal_ends_batches_in_threads_at_their_next_step(workers: int) -> None:
    """Each batch would take a minute; the threads are gone at once."""
    one = pipe()
    unet = one.components["unet"]

    def draw(_: Any, batch: range) -> int:
        if batch.start == 0:
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        for _ in range(600):
            unet(torch.zeros(1, 2))
            time.sleep(0.1)
        return 1

    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        list(each_batch(one, [range(i, i + 1) for i in range(4)], draw, workers))
    assert time.monotonic() - begun < 10
    assert not unet._forward_pre_hooks


def square(number: int) -> int:
    if number < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def test_a_killed_process_is_an_error_and_not_a_wait() -> None:
    assert list(each(square, [1, 2, 3], 2)) == [1, 4, 9]
    with pytest.raises(Exception, match="terminated abruptly") as caught:
        list(each(square, [1, -1], 2))
    assert "--processes" in str(explain(caught.value))


def test_processes_end_with_the_one_that_was_killed(tmp_path: Path) -> None:
    """SIGKILL leaves no time to end them."""
    (tmp_path / "sleeping.py").write_text(
        "import os, sys, time, pathlib\n"
        "from lit_safety.core.processes import each\n"
        "def work(place):\n"
        "    pathlib.Path(place, str(os.getpid())).touch()\n"
        "    time.sleep(60)\n"
        "if __name__ == '__main__':\n"
        "    list(each(work, [sys.argv[1]] * 2, 2))\n"
    )
    (tmp_path / "pids").mkdir()
    process = subprocess.Popen([sys.executable, str(tmp_path / "sleeping.py"), str(tmp_path / "pids")])
    begun = time.monotonic()
    while not (pids := [int(file.name) for file in (tmp_path / "pids").iterdir()]):
        assert time.monotonic() - begun < 60
        time.sleep(0.05)
    process.kill()
    process.wait()
    while any(alive(pid) for pid in pids) and time.monotonic() - begun < 90:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for its child in /proc")
def test_a_killed_loader_is_one_line(
    command_line: Arguments, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def kill(*_: Any) -> None:
        for child in multiprocessing.active_children():
            os.kill(child.pid or 0, signal.SIGKILL)
        time.sleep(2)

    monkeypatch.setattr("lit_safety.callbacks.RunSummary.on_train_batch_start", kill, raising=False)
    words = ["--data.init_args.num_workers", "1", "--trainer.max_steps", "40"]
    assert main(command_line("fit", *words)) == 2
    (complaint,) = complaints(capsys.readouterr().err)
    assert "num_workers" in complaint


def test_a_loader_that_is_killed_while_it_hands_over_a_batch_is_one_line() -> None:
    """As torch's loader raises it; the file's name says where it comes from."""
    work: dict[str, Any] = {}
    file = torch.utils.data.dataloader.__file__
    exec(compile("def get():\n    raise ConnectionResetError(104, 'Connection reset by peer')\n", file, "exec"), work)
    assert "num_workers" in str(explain(raised(work["get"])))
    assert explain(ConnectionResetError(104, "Connection reset by peer")) is None


def raised(work: Callable[[], Any]) -> BaseException:
    try:
        work()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def from_library(error: BaseException) -> BaseException:
    """The error as it comes out of Python's own code, without a frame of this file."""
    error = raised(lambda: (_ for _ in ()).throw(error))
    return error.with_traceback(None)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.EMFILE, "Too many open files", "/some/file"), "ulimit -n"),
        (RuntimeError("received 0 items of ancdata"), "ulimit -n"),
        (OSError(errno.EROFS, "Read-only file system", "/some/file"), "/some/file"),
        (PermissionError(errno.EACCES, "Permission denied", "/some/file"), "/some/file"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "/some/file"), "/some/file: is a folder"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/some/file"), "/some/file: must be a folder"),
        (OSError(errno.ENOSPC, "No space left on device"), "no space"),
        (OSError(errno.EFBIG, "File too large", "/some/file"), "/some/file"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "num_workers"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_what_the_machine_refuses_is_explained(error: BaseException, says: str) -> None:
    message = explain(from_library(error))
    assert message is not None
    assert says in message
    assert "\n" not in message


def test_an_error_that_passes_through_any_file_of_the_package_is_explained(tmp_path: Path) -> None:
    """Only a class of the user's keeps its traceback."""
    try:
        (tmp_path / "file").touch()
        read_text(tmp_path / "file" / "judge")
    except OSError as error:
        trace = error.__traceback__
        assert trace is not None
        message = explain(error.with_traceback(trace.tb_next))
    assert message is not None
    assert str(tmp_path / "file") in message


def test_a_defect_and_a_user_s_own_class_keep_their_traceback() -> None:
    assert explain(from_library(ValueError("a defect"))) is None
    assert explain(raised(lambda: Path("/no/such/file").stat())) is None, "raised in a file of the user's"


def test_few_handles_is_one_line(tmp_path: Path) -> None:
    """A real limit on a real command."""
    code = (
        "import resource, sys, torch, jsonargparse, lit_safety.data.validate, lit_safety.cli.commands\n"
        "import lit_safety.core.parsing\n"
        "from lit_safety.__main__ import main\n"
        "held = [open('/dev/null') for _ in range(5)]\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (len(held) + 3, len(held) + 3))\n"
        f"sys.exit(main(['shards', 'validate', {str(TOYWORLD / 'shards' / 'val')!r}]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode in (1, 2), done.stderr
    assert "Traceback" not in done.stderr
    assert len(complaints(done.stderr)) == 1


def test_a_reader_that_goes_away_is_reported_by_the_status_alone() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "lit_safety", "--help"], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert done.returncode == 141, "as of any tool that SIGPIPE ends"
    assert done.stderr == b""


def test_a_checkpoint_that_is_none_is_one_line(
    command_line: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, content in enumerate((b"", b"some text\n", b"PK\x03\x04" + b"\0" * 200)):
        file = tmp_path / f"{number}.ckpt"
        file.write_bytes(content)
        words = ["--ckpt_path", str(file), "--trainer.callbacks", "[]", "--trainer.logger", "false"]
        assert main(command_line("validate", *words)) == 2
        (complaint,) = complaints(capsys.readouterr().err)
        assert "--ckpt_path" in complaint


def test_a_link_to_itself_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert main(["merge", str(tmp_path / "loop"), str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    (complaint,) = complaints(capsys.readouterr().err)
    assert "loop" in complaint


def test_progress_in_a_file_is_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("draw base", 40) as tick:
        tick(10)
        tick(30)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "draw base: 0 of 40"
    assert lines[-1].startswith("draw base: 40 done")


def test_progress_says_how_long_it_takes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter([0.0, 0.1, 20.0, 40.0])
    monkeypatch.setattr("lit_safety.core.progress.time.monotonic", lambda: next(clock))
    lines = Lines("draw", 1000)
    lines.advance(500)  # were there already
    lines.advance(100)
    lines.advance(100)
    assert capsys.readouterr().err.splitlines()[1:] == [
        "draw: 600 of 1000 (60%), about 1 min left",
        "draw: 700 of 1000 (70%), about 1 min left",
    ]


def test_test_refuses_the_toy_world_s_prompts_for_another_model(
    command_line: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The method's file names them, and the model is one's own: said before a pair or a weight is read."""
    torch.save({"state_dict": {}}, tmp_path / "a.ckpt")
    assert main(command_line("test", "--ckpt_path", str(tmp_path / "a.ckpt"), "--trainer.logger", "false")) == 2
    (complaint,) = complaints(capsys.readouterr().err)
    for name in ("EvaluateOnTest", "other_world", "data/toyworld/prompts/test.csv"):
        assert name in complaint


def test_a_command_whose_output_nobody_reads_has_not_done_its_work(tmp_path: Path) -> None:
    """A scheduler would take 0 for a training that came to its end."""
    code = (
        "import sys, time\nfrom lit_safety import __main__ as program\n"
        "def work(arguments):\n"
        "    while True: print('a line', flush=True); time.sleep(0.01)\n"
        "program._run = work\nsys.exit(program.main(['fit']))\n"
    )
    command = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert command.stdout is not None
    assert command.stderr is not None
    command.stdout.readline()
    command.stdout.close()
    assert command.wait(timeout=60) == 141
    assert command.stderr.read() == b""


def test_another_pipe_that_breaks_is_no_quiet_end(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    def work(*_: Any) -> int:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(program, "_run", work)
    with pytest.raises(BrokenPipeError):
        main(["fit"])


@pytest.mark.parametrize(
    "variable", ["LOCAL_RANK", "RANK", "WORLD_SIZE", "SLURM_NTASKS", "SLURM_PROCID", "MASTER_PORT"]
)
def test_a_launcher_s_variable_that_is_no_number_is_named(
    variable: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(variable, "abc")
    assert main(["fit", "--config", "configs/scdpo.yaml"]) == 2
    (complaint,) = complaints(capsys.readouterr().err)
    assert variable in complaint
    monkeypatch.setenv(variable, "")
    check_launcher()
    assert variable not in os.environ
