"""bf16-mixed means the same under every strategy: autocast, with weights and batches in fp32."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy
from losses import mean_losses
from methods import exported, under, write_config
from ranks import run

from lit_safety.errors import UserError
from lit_safety.modules.deepspeed_precision import set_precision


def with_precision(precision: str, **options: object) -> DeepSpeedStrategy:
    strategy = DeepSpeedStrategy(precision_plugin=DeepSpeedPrecision(precision), **options)  # type: ignore[arg-type]
    set_precision(strategy)
    return strategy


def test_a_batch_keeps_its_numbers_and_the_engine_its_weights():
    """1 + 2^-10 would be 1 in bfloat16."""
    strategy = with_precision("bf16-mixed")
    assert strategy.config["bf16"] == {"enabled": False}
    assert strategy.config["torch_autocast"]["enabled"]
    batch = SimpleNamespace(cost=torch.tensor([1 + 2**-10]))
    assert strategy.precision_plugin.convert_input(batch.cost) is batch.cost
    assert "torch_autocast" not in with_precision("32-true").config


def test_a_configuration_of_the_users_own_is_left_alone():
    own = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}
    assert "torch_autocast" not in with_precision("bf16-mixed", config=own).config


def test_float16_is_refused_by_name():
    with pytest.raises(UserError, match=r"trainer.precision: 16-mixed.* bf16-mixed"):
        with_precision("16-mixed")


@pytest.mark.slow
def test_strategies_compute_what_one_process_does(tiny_pipeline: Path, user_shards: Path, tmp_path: Path):
    """Two ranks with batches of 1 against one process with 2, two batches an optimizer step.

    bfloat16 has 8 bits: a product may fall to the other side in another batch. Under float16 or rounded weights the
    losses would part by much more than the tolerance.
    """
    found = {}
    for strategy in ("alone", "ddp", "fsdp", "deepspeed_zero2", "deepspeed_zero3"):
        folder = tmp_path / strategy
        folder.mkdir()
        ranks = 1 if strategy == "alone" else 2
        mixed = {"precision": "bf16-mixed", "accumulate_grad_batches": 2}
        config = write_config(folder, "scdpo", tiny_pipeline, user_shards, **mixed)
        command = ["fit", "--config", str(config), "--data.init_args.batch_size", str(2 // ranks)]
        command += [] if ranks == 1 else [*under(strategy), "--trainer.devices", "2"]
        run(command, folder / "logs", ranks=ranks)
        found[strategy] = mean_losses(folder / "losses"), exported(folder / "runs" / "fit" / "latest")
    losses, weights = found.pop("alone")
    moved = max(value.abs().max().item() for name, value in weights.items() if "lora_B" in name)
    assert moved > 1e-5
    for strategy, (theirs, trained) in found.items():
        assert theirs == pytest.approx(losses, rel=1e-2), strategy
        assert all(value.dtype == torch.float32 for value in trained.values())
        off = max((trained[name] - value).abs().max().item() for name, value in weights.items())
        assert off < 0.2 * moved, strategy
