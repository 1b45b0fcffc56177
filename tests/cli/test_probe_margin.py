"""The probe of m's scale: it trains, reports the scale, and leaves the run unchanged."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image
from safetensors.torch import load_file

from lit_safety.__main__ import main
from lit_safety.callbacks import ProbeMargin
from lit_safety.callbacks.probe_margin import advice, rms
from lit_safety.core.errors import UserError
from lit_safety.data import PreferenceDataModule
from lit_safety.data.format.writer import ShardWriter
from lit_safety.modules import SCDPO
from lit_safety.objectives import SafetyConstrainedDPO

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
        r"lambda 2 x E\[C_l - C_w\] 2.00 adds 4.00",
        capsys.readouterr().out,
    )
    assert said
    assert float(said[2]) > 0
    assert all(torch.equal(plain[name], probed[name]) for name in plain)


class Brightness:
    """In a cost model's place: -1 for black, 1 for white."""

    def to(self, device: torch.device) -> Brightness:
        return self

    def costs(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((1, 2, 3))


def write_without_costs(folder: Path, chosen: int, rejected: int) -> str:
    """Two plain pairs, keys 0 and 1, of these shades of grey."""
    harmful = {"chosen": False, "rejected": True}
    metadata = {"prompt": "a cat", "prompt_kind": "clean", "harmful": harmful, "order": "safety"}
    with ShardWriter(folder) as writer:
        for key in ("0", "1"):
            writer.write(key, metadata, *(Image.new("RGB", (32, 32), (grey,) * 3) for grey in (chosen, rejected)))
    return str(folder)


@pytest.mark.parametrize(
    ("cost_clip", "says"),
    [(None, r"lambda 2 x E\[C_l - C_w\] 2.00 adds 4.00"), (0.25, r"\] 0.50 adds 1.00")],
)
def test_lambdas_part_is_that_of_the_costs_in_the_loss(
    tiny_pipeline: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    cost_clip: float | None,
    says: str,
):
    """Validation pairs are scored as (-1, 1), which the clip makes (-0.25, 0.25); training pairs of the same keys as
    (1, -1), and the probe, which came first, has not left them the others' costs."""
    monkeypatch.setattr("lit_safety.cost_model.files.load_cost_model", lambda folder: Brightness())
    objective = SafetyConstrainedDPO(beta=100.0, cost_weight=2.0, cost_clip=cost_clip)
    module = SCDPO(str(tiny_pipeline), objective, cost_model="stood in for")
    train, val = write_without_costs(tmp_path / "t", 255, 0), write_without_costs(tmp_path / "v", 0, 255)
    data = PreferenceDataModule(train=train, val=val, batch_size=2)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    Trainer(max_steps=1, accelerator="cpu", callbacks=[ProbeMargin(1)], limit_val_batches=0, **quiet).fit(module, data)
    assert re.search(says, capsys.readouterr().out)
    assert module._costs == {
        "train": {key: pytest.approx((1.0, -1.0)) for key in "01"},
        "val": {key: pytest.approx((-1.0, 1.0)) for key in "01"},
    }


def test_rms_of_numbers():
    """sqrt((9 + 16) / 2) = 3.5355."""
    assert rms(torch.tensor([3.0, -4.0])).item() == pytest.approx(3.5355, abs=1e-4)


def test_no_steps_are_refused():
    with pytest.raises(UserError, match="steps"):
        ProbeMargin(0)


def test_the_line_says_which_key_and_which_value():
    """Half of an RMS of 4 over a gap of 2: lambda 1. An RMS of 2.9 compared with 4.6 is not changed."""
    key = "model.init_args.objective.init_args"
    for weight in (3.0, 0.2):  # 6 logits and 0.4, compared with an RMS of 4
        assert f"{key}.cost_weight: 1`" in advice(weight, 2.0, 4.0)
    assert f"{key}.beta" in advice(3.0, 2.0, 4.0)
    assert key not in advice(2.0, 1.45, 4.6)
    assert f"{key}.beta" in advice(1.0, 2.0, 0.01)
    swapped = advice(1.0, -0.5, 4.0)
    assert "data.val" in swapped
    assert key not in swapped


def test_the_value_that_is_named_is_left_as_it_is():
    for gap, size in ((0.3, 7.0), (5.0, 0.4)):
        (value,) = re.findall(r"cost_weight: ([\d.e+-]+)`", advice(1000.0, gap, size))
        assert "cost_weight" not in advice(float(value), gap, size)
