import subprocess
import sys
import time

import pytest

from lit_safety.cli.commands import run_command


def test_help_needs_no_torch_and_answers_at_once():
    code = "import sys; from lit_safety.__main__ import main; main(['--help']); sys.exit('torch' in sys.modules)"
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 2
    for command in ("fit", "validate", "test", "predict", "evaluate", "shards", "toyworld"):
        assert command in done.stdout


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("evaluate", {"batch_size", "workers", "device", "precision"}),
        ("attack", {"batch_size", "workers", "device", "precision"}),
        ("users evaluate", {"batch_size", "workers", "device", "precision"}),
        ("users grid", {"batch_size", "device", "precision"}),
        ("cost-model", {"batch_size", "workers", "device", "precision"}),
        ("shards generate", {"batch_size", "device", "precision"}),
    ],
)
def test_commands_that_draw_show_the_options_that_they_share(
    command: str, options: set[str], capsys: pytest.CaptureFixture[str]
):
    """With their defaults, which are the group's own or the command's."""
    with pytest.raises(SystemExit):
        run_command([*command.split(), "--help"])
    text = capsys.readouterr().out
    assert {name for name in options | {"steps", "guidance", "resolution"} if f"\n  --{name}" not in text} == set()
    shown = " ".join(text.split())
    steps = "30" if command == "shards generate" else "20"
    assert "--steps STEPS Denoising steps" in shown
    assert f"(type: int, default: {steps})" in shown
    assert "--drawing" not in text
    if command != "evaluate":
        assert "--edit" not in text


def test_no_arguments_show_the_help_and_fail():
    done = subprocess.run([sys.executable, "-m", "lit_safety"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "usage:" in done.stdout
