import subprocess
import sys
import time

import pytest

from lit_safety.__main__ import main
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
        ("patch", {"batch_size", "workers", "device", "precision"}),
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


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_the_trainers_help_is_a_short_page_that_needs_no_torch(command: str):
    code = (
        f"import sys; from lit_safety.__main__ import main; main([{command!r}, '--help']); "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) < 80
    assert max(map(len, lines)) <= 120
    for named in ("--config", "--ckpt_path", f"{command} --help_all", "--model.help CLASS", "configs/scdpo.yaml"):
        assert named in done.stdout


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> set[str]:
    """The keys that `fit --help` lists."""
    assert main(["fit", *words, "--help"]) == 0
    return {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}


def test_the_help_of_fit_lists_the_keys_of_the_method_that_is_named(capsys: pytest.CaptureFixture[str]):
    default = shown(capsys)
    assert {"pretrained", "cost_model", "lora", "beta", "cost_weight", "anchor_weight", "rank", "batch_size"} <= default
    users = shown(capsys, "--config", "psa.yaml")
    assert {"user_dropout", "user_tokens", "label_smoothing"} <= users
    assert not {"cost_weight", "cost_model"} & users
    other = shown(capsys, "--config", "scdpo.yaml", "--model.objective", "lit_safety.objectives.FocalInverse")
    assert "cost_weight" not in other
    assert "beta" in other
    assert {"features", "clip"} <= shown(capsys, "--model", "lit_safety.modules.CostModel")


def test_the_full_help_is_there_on_request(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--help_all"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for option in ("--trainer.max_steps", "--trainer.detect_anomaly", "--model.help", "--run.root"):
        assert option in text


def test_a_mistake_does_not_hide_the_help(capsys: pytest.CaptureFixture[str]):
    """The page of a config with a mistake in it is that of the default."""
    assert {"beta", "rank"} <= shown(capsys, "--config", "no such file.yaml")


def test_no_arguments_show_the_help_and_fail():
    done = subprocess.run([sys.executable, "-m", "lit_safety"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "usage:" in done.stdout
