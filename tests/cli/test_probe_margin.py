"""The probe of m's scale: it trains, tells, and leaves no trace."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lit_safety.__main__ import main
from lit_safety.callbacks import ProbeMargin
from lit_safety.callbacks.probe_margin import rms
from lit_safety.errors import UserError

Arguments = Callable[..., list[str]]
CALLBACKS = '[{"class_path": "lit_safety.callbacks.ExportAdapter"}%s]'
PROBE = ', {"class_path": "lit_safety.callbacks.ProbeMargin", "init_args": {"steps": 3}}'


def weights(arguments: Arguments, tmp_path: Path, name: str, callbacks: str) -> dict[str, torch.Tensor]:
    assert main(arguments("fit", "--run.name", name, "--trainer.callbacks", callbacks)) == 0
    return load_file(tmp_path / "runs" / name / "latest" / "adapter" / "pytorch_lora_weights.safetensors")


def test_it_prints_both_scales_and_changes_nothing(
    command_line: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Costs are -1 and 1 in every pair: E[C_l - C_w] is 2, and lambda 2 asks for 4 logits more."""
    plain = weights(command_line, tmp_path, "plain", CALLBACKS % "")
    capsys.readouterr()
    probed = weights(command_line, tmp_path, "probed", CALLBACKS % PROBE)
    said = re.search(
        r"margin  after 3 steps with lambda 0, m has a mean of (\S+) and an RMS of (\S+) logits; "
        r"lambda 2 x E\[C_l - C_w\] 2.00 asks for 4.00 more",
        capsys.readouterr().out,
    )
    assert said
    assert float(said[2]) > 0
    assert all(torch.equal(plain[name], probed[name]) for name in plain)


def test_rms_of_numbers():
    """sqrt((9 + 16) / 2) = 3.5355."""
    assert rms(torch.tensor([3.0, -4.0])).item() == pytest.approx(3.5355, abs=1e-4)


def test_no_steps_are_refused():
    with pytest.raises(UserError, match="steps"):
        ProbeMargin(0)
