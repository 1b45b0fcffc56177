"""bf16-mixed means the same under every strategy: autocast, with weights and batches in fp32."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy

from lit_safety.core.errors import UserError
from lit_safety.modules.strategies import set_step
from tests.helpers.methods import exported, under, write_config
from tests.helpers.ranks import run


def with_precision(precision: str, **options: object) -> DeepSpeedStrategy:
    strategy = DeepSpeedStrategy(precision_plugin=DeepSpeedPrecision(precision), **options)  # type: ignore[arg-type]
    set_step(strategy)
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


def test_casts_are_not_kept_from_a_pass_without_gradient():
    """DeepSpeed's engine enters autocast as it is set; torch would give the second pass the first one's cast."""
    weight = torch.ones(2, 2, requires_grad=True)
    plugin = with_precision("bf16-mixed").precision_plugin
    with plugin.train_step_context(), torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            torch.nn.functional.linear(torch.ones(1, 2), weight)
        loss = torch.nn.functional.linear(torch.ones(1, 2), weight).sum()
    assert torch.autograd.grad(loss, [weight])[0].abs().max() > 0
    assert torch.is_autocast_cache_enabled()


@pytest.mark.slow
def test_strategies_round_as_one_process_does(tiny_pipeline: Path, user_shards: Path, tmp_path: Path):
    """Two ranks with batches of 1 against one process with 2, two batches an optimizer step, steps so small that
    rounding is not amplified.

    bfloat16 has 8 bits, so no two runs agree; but all of them should be equally far from the run in fp32, and have
    moved as far along its direction. A gradient that was divided twice, or weights in float16, would not.
    """
    moved = {}
    for strategy in ("fp32", "alone", "ddp", "fsdp", "deepspeed_zero2", "deepspeed_zero3"):
        folder = tmp_path / strategy
        folder.mkdir()
        ranks = 1 if strategy in ("fp32", "alone") else 2
        precision = "32-true" if strategy == "fp32" else "bf16-mixed"
        settings = {"precision": precision, "accumulate_grad_batches": 2}
        config = write_config(folder, "scdpo", tiny_pipeline, user_shards, **settings)
        command = ["fit", "--config", str(config), "--data.init_args.batch_size", str(2 // ranks)]
        command += ["--model.init_args.optimizer.init_args.lr", "0.02"]
        command += [] if ranks == 1 else [*under(strategy), "--trainer.devices", "2"]
        run(command, folder / "logs", ranks=ranks)
        trained = exported(folder / "runs" / "fit" / "latest")
        assert all(value.dtype == torch.float32 for value in trained.values())
        # LoRA's B begins at 0: what it is is what it moved.
        moved[strategy] = torch.cat([trained[name].flatten() for name in sorted(trained) if "lora_B" in name])
    true = moved.pop("fp32")
    assert true.norm() > 0
    rounding = (moved["alone"] - true).norm()
    assert rounding < 0.3 * true.norm()
    for strategy, found in moved.items():
        assert (found - true).norm() < 1.25 * rounding, strategy
        assert (found @ true / (true @ true)).item() == pytest.approx(1.0, abs=0.02), strategy
