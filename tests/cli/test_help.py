import subprocess
import sys
import time


def test_help_needs_no_torch_and_answers_at_once():
    code = "import sys; from lit_safety.__main__ import main; main(['--help']); sys.exit('torch' in sys.modules)"
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 2
    for command in ("fit", "validate", "test", "predict", "evaluate", "shards", "toyworld"):
        assert command in done.stdout


def test_no_arguments_show_the_help_and_fail():
    done = subprocess.run([sys.executable, "-m", "lit_safety"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "usage:" in done.stdout
