"""Every method under every kind of strategy on a transformer of rectified flow, through the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.flow_pipelines import FAMILIES, save_flow
from tests.helpers.losses import mean_losses
from tests.helpers.methods import STEPS, exported, under, write_config
from tests.helpers.ranks import run, start

METHODS = ("scdpo", "full", "dpo_expert")
STRATEGIES = ("ddp", "fsdp", "deepspeed_zero3")
#: The family of `make test`: FLUX.1 has two streams, fused single blocks, a pooled text and embedded guidance.
QUICK = "flux"
#: 2 ranks x 1 pair x 2 micro-batches are the 4 pairs of an optimizer step of one process.
ACCUMULATED = 2
ONE_PAIR = ["--data.init_args.batch_size", "1", "--trainer.accumulate_grad_batches", str(ACCUMULATED)]
ONE_PAIR += ["--trainer.val_check_interval", str(STEPS * ACCUMULATED)]
#: A full fine-tune's frozen copy cannot be left whole by ZeRO 3, of any model.
CASES = [
    pytest.param(family, method, strategy, marks=() if family == QUICK else pytest.mark.slow)
    for family in FAMILIES
    for method in METHODS
    for strategy in STRATEGIES
    if (method, strategy) != ("full", "deepspeed_zero3")
]


class Alone:
    """What one process with all pairs of a step at once computes, once for each family and method."""

    def __init__(self, folder: Path, shards: Path) -> None:
        self.folder, self.shards = folder, shards
        self.pipelines: dict[str, Path] = {}
        self.done: dict[str, tuple[list[float], dict[str, torch.Tensor]]] = {}

    def pipeline(self, family: str) -> Path:
        if family not in self.pipelines:
            self.pipelines[family] = save_flow(family, self.folder / f"{family}-pipeline")
        return self.pipelines[family]

    def __call__(self, family: str, method: str, consecutive: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
        name = f"{family}-{method}-{consecutive}"
        if name not in self.done:
            folder = self.folder / name
            folder.mkdir()
            config = write_config(folder, method, self.pipeline(family), self.shards, consecutive)
            run(["fit", "--config", str(config), "--data.init_args.batch_size", "4"], folder / "logs", ranks=1)
            self.done[name] = mean_losses(folder / "losses"), exported(folder / "runs" / "fit" / "latest")
        return self.done[name]


@pytest.fixture(scope="module")
def alone(user_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    return Alone(tmp_path_factory.mktemp("alone"), user_shards)


@pytest.mark.parametrize(("family", "method", "strategy"), CASES)
def test_two_ranks_are_one_process_with_all_pairs_at_once(
    family: str, method: str, strategy: str, alone: Alone, user_shards: Path, tmp_path: Path
):
    """Losses and exports agree but for the order of sums."""
    consecutive = method == "dpo_expert" and strategy.startswith("deepspeed")
    pipeline = alone.pipeline(family)
    config = write_config(tmp_path, method, pipeline, user_shards, consecutive)
    command = ["fit", "--config", str(config), *under(strategy), "--trainer.devices", "2", *ONE_PAIR]
    run(command, tmp_path / "logs")
    losses, weights = alone(family, method, consecutive)
    assert mean_losses(tmp_path / "losses", ACCUMULATED) == pytest.approx(losses, rel=1e-3)
    found = exported(tmp_path / "runs" / "fit" / "latest")
    assert found.keys() == weights.keys()
    begun = {}
    if method == "full":
        begun = load_file(pipeline / "transformer" / "diffusion_pytorch_model.safetensors")
    moved = largest(
        {
            name: value - begun[name.partition("/")[2]] if begun else value
            for name, value in weights.items()
            if begun or "lora_B" in name
        }
    )
    assert moved > 1e-5
    assert largest({name: found[name] - value for name, value in weights.items()}) < 2e-2 * moved


def largest(weights: dict[str, torch.Tensor]) -> float:
    return max(value.abs().max().item() for value in weights.values())


def test_users_bounds_are_refused_by_name(alone: Alone, user_shards: Path, tmp_path: Path):
    """User attention is added to the cross-attention of a UNet, which these transformers do not have."""
    config = write_config(tmp_path, "psa", alone.pipeline(QUICK), user_shards)
    refused = start(["fit", "--config", str(config)], tmp_path / "logs", ranks=1)
    assert refused.wait() == [2], refused.said()
    (line,) = [line for line in refused.said().splitlines() if line.startswith("error: ")]
    assert "FluxPipeline" in line
    assert "PSA" in line
