"""Two ranks under every shipped strategy against one process with as many pairs a step, through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from safetensors.torch import load_file

from lit_safety.__main__ import main
from lit_safety.core.errors import UserError
from lit_safety.modules import CostModel
from lit_safety.modules.strategies import prepare_strategy
from tests.helpers.losses import mean_losses
from tests.helpers.methods import CONFIGS, METHODS, STEPS, STRATEGIES, exported, under, write_config
from tests.helpers.ranks import Ranks, run, start

#: Not slow: SCDPO under every strategy, its resume too, and every other method under DDP and ZeRO 2.
QUICK = {*(("scdpo", strategy) for strategy in STRATEGIES)}
QUICK |= {(method, strategy) for method in METHODS for strategy in ("ddp", "deepspeed_zero2")}
REFUSED = {("full", "deepspeed_zero3")}
#: 2 ranks x 1 pair x 2 micro-batches are the 4 pairs of an optimizer step of one process.
ACCUMULATED = 2
ONE_PAIR = ["--data.init_args.batch_size", "1", "--trainer.accumulate_grad_batches", str(ACCUMULATED)]
ONE_PAIR += ["--trainer.val_check_interval", str(STEPS * ACCUMULATED)]
CASES = [
    pytest.param(method, strategy, marks=() if (method, strategy) in QUICK else pytest.mark.slow)
    for method in METHODS
    for strategy in STRATEGIES
    if (method, strategy) not in REFUSED
]


class Alone:
    """What one process with all pairs of a step at once computes, once for each method and order of its experts."""

    def __init__(self, folder: Path, pipeline: Path, shards: Path) -> None:
        self.folder, self.pipeline, self.shards = folder, pipeline, shards
        self.done: dict[str, tuple[list[float], dict[str, torch.Tensor]]] = {}

    def __call__(self, method: str, consecutive: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
        name = f"{method}-{consecutive}"
        if name not in self.done:
            folder = self.folder / name
            folder.mkdir()
            config = write_config(folder, method, self.pipeline, self.shards, consecutive)
            run(["fit", "--config", str(config), "--data.init_args.batch_size", "4"], folder / "logs", ranks=1)
            self.done[name] = mean_losses(folder / "losses"), exported(folder / "runs" / "fit" / "latest")
        return self.done[name]


@pytest.fixture(scope="module")
def alone(tiny_pipeline: Path, user_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    return Alone(tmp_path_factory.mktemp("alone"), tiny_pipeline, user_shards)


@pytest.mark.parametrize(("method", "strategy"), CASES)
def test_two_ranks_that_accumulate_are_one_with_all_pairs_at_once_and_go_on_exactly(
    method: str, strategy: str, alone: Alone, tiny_pipeline: Path, user_shards: Path, tmp_path: Path
):
    """Losses and exports agree but for the order of sums; a run resumed half-way ends in the same bits."""
    consecutive = method == "dpo_expert" and strategy.startswith("deepspeed")
    config = write_config(tmp_path, method, tiny_pipeline, user_shards, consecutive)
    command = ["fit", "--config", str(config), *under(strategy), "--trainer.devices", "2", *ONE_PAIR]
    run(command, tmp_path / "logs")
    losses, weights = alone(method, consecutive)
    assert mean_losses(tmp_path / "losses", ACCUMULATED) == pytest.approx(losses, rel=1e-3)
    latest = tmp_path / "runs" / "fit" / "latest"
    found, whole = exported(latest), latest.resolve()
    assert found.keys() == weights.keys()
    moved = largest({name: value - start_of(method, name, value, tiny_pipeline) for name, value in weights.items()})
    assert moved > 1e-5
    assert largest({name: found[name] - value for name, value in weights.items()}) < 2e-2 * moved
    if method == "scdpo" or (method, strategy) not in QUICK:  # of those the next test does it
        goes_on_from_the_middle(command, whole, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "strategy"), sorted(one for one in QUICK if one[0] != "scdpo"))
def test_what_quick_tests_leave_out_goes_on_exactly_too(
    method: str, strategy: str, tiny_pipeline: Path, user_shards: Path, tmp_path: Path
):
    consecutive = method == "dpo_expert" and strategy.startswith("deepspeed")
    config = write_config(tmp_path, method, tiny_pipeline, user_shards, consecutive)
    command = ["fit", "--config", str(config), *under(strategy), "--trainer.devices", "2", *ONE_PAIR]
    run(command, tmp_path / "logs")
    goes_on_from_the_middle(command, (tmp_path / "runs" / "fit" / "latest").resolve(), tmp_path)


def goes_on_from_the_middle(command: list[str], whole: Path, folder: Path, ranks: int = 2) -> None:
    """Resume ``command`` from the second of its four steps: the exports are those of ``whole``, its run, to the bit."""
    run([*command, "--ckpt_path", str(whole / "checkpoints" / "step=2.ckpt")], folder / "logs", ranks=ranks)
    latest = folder / "runs" / "fit" / "latest"
    assert latest.resolve() != whole
    resumed, expected = exported(latest), exported(whole)
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[name], value) for name, value in expected.items())


@pytest.mark.slow
def test_the_whole_denoiser_under_zero_3_from_a_reference_cache(tiny_pipeline: Path, user_shards: Path, tmp_path: Path):
    """Where no copy can be kept; the cache says what the reference would."""
    cached = tmp_path / "cached"
    precompute = ["shards", "precompute", str(user_shards), "--model", str(tiny_pipeline), "--out", str(cached)]
    assert main([*precompute, "--dtype", "float32", "--resolution", "32", "--reference_draws", "2"]) == 0
    found = {}
    for ranks, more in ((1, ["--data.init_args.batch_size", "4"]), (2, [*under("deepspeed_zero3"), *ONE_PAIR])):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        config = write_config(folder, "full", tiny_pipeline, cached)
        command = ["fit", "--config", str(config), "--trainer.devices", str(ranks), *more]
        command += ["--model.init_args.objective.init_args.anchor_weight", "0"]  # would need its predictions
        run(command, folder / "logs", ranks=ranks)
        latest = folder / "runs" / "fit" / "latest"
        found[ranks] = mean_losses(folder / "losses", ACCUMULATED if ranks == 2 else 1), exported(latest)
    goes_on_from_the_middle(command, latest.resolve(), folder)
    (losses, weights), (theirs, trained) = found[1], found[2]
    assert theirs == pytest.approx(losses, rel=1e-3)
    assert trained.keys() == weights.keys()
    moved = largest({name: value - start_of("full", name, value, tiny_pipeline) for name, value in weights.items()})
    assert moved > 1e-5
    assert largest({name: trained[name] - value for name, value in weights.items()}) < 2e-2 * moved


def largest(weights: dict[str, torch.Tensor]) -> float:
    return max(value.abs().max().item() for value in weights.values())


def start_of(method: str, name: str, value: torch.Tensor, pipeline: Path) -> torch.Tensor:
    """What a weight was before training, where its movement is to be seen: 0 for LoRA's B and users' values."""
    if method == "full":
        return load_file(pipeline / "unet" / "diffusion_pytorch_model.safetensors")[name.partition("/")[2]]
    starts_at_zero = "lora_B" in name or "to_v_user" in name
    return torch.zeros_like(value) if starts_at_zero else value


def complaint(ranks: Ranks) -> str:
    """The one line of a run that must be refused."""
    assert ranks.wait() == [2], ranks.said()
    (line,) = [line for line in ranks.said().splitlines() if line.startswith("error: ")]
    return line


def test_what_cannot_work_is_refused_by_name(tiny_pipeline: Path, user_shards: Path, tmp_path: Path):
    parallel = json.dumps({"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"})
    targets = ["--model.init_args.lora.init_args.target_modules", "[text_encoder.q_proj]"]
    runs = {
        "ZeRO 3": ("full", under("deepspeed_zero3")),
        "set `data.init_args.consecutive: true`": ("dpo_expert", under("deepspeed_zero2")),
        "needs CUDA GPUs": ("scdpo", under("deepspeed_zero2")[:2]),
        "tensor_parallel_size": ("scdpo", ["--trainer.strategy", parallel]),
        "text encoders are frozen": ("scdpo", targets),
    }
    begun = {}
    for number, (says, (method, more)) in enumerate(runs.items()):  # all at once: most of it is waiting for each other
        folder = tmp_path / str(number)
        folder.mkdir()
        config = write_config(folder, method, tiny_pipeline, user_shards)
        begun[says] = start(["fit", "--config", str(config), *more], folder / "logs", ranks=1)
    for says, ranks in begun.items():
        assert says in complaint(ranks)


def test_strategies_and_modules_that_do_not_go_together_are_refused():
    with pytest.raises(UserError, match="use FSDP2"):
        prepare_strategy(SimpleNamespace(strategy=FSDPStrategy()))
    cost_model = CostModel("no-clip-is-read")
    cost_model._trainer = SimpleNamespace(strategy=ModelParallelStrategy())  # type: ignore[assignment]
    with pytest.raises(UserError, match="use ddp"):
        cost_model.configure_model()


@pytest.mark.parametrize("overlay", sorted((CONFIGS / "strategies").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_overlay_is_parsed(overlay: Path, capsys: pytest.CaptureFixture[str]):
    """Beside a whole config; every key of it is there afterwards."""
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", str(CONFIGS / "scdpo.yaml"), "--config", str(overlay), "--print_config"])
    assert ended.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)["trainer"]["strategy"]
    asked = yaml.safe_load(overlay.read_text())["trainer"]["strategy"]
    assert printed["class_path"] == asked["class_path"]
    assert printed["init_args"] | asked["init_args"] == printed["init_args"]


@pytest.mark.slow
def test_offload_runs_where_its_optimizer_can_be_compiled(tiny_pipeline: Path, user_shards: Path, tmp_path: Path):
    """Else one line says what is missing."""
    from deepspeed.ops.op_builder import CPUAdamBuilder

    config = write_config(tmp_path, "scdpo", tiny_pipeline, user_shards)
    adam = {"class_path": "deepspeed.ops.adam.DeepSpeedCPUAdam", "init_args": {"lr": 1e-3}}
    command = ["fit", "--config", str(config), *under("deepspeed_zero3_offload"), "--trainer.devices", "2"]
    command += ["--trainer.strategy.init_args.pin_memory", "false", "--model.init_args.optimizer", json.dumps(adam)]
    ranks = start(command, tmp_path / "logs")
    codes = ranks.wait(600)
    if codes != [0, 0]:
        assert codes == [2, 2], ranks.said()
        assert "error: " in ranks.said()
        assert "compile" in ranks.said()
        assert not CPUAdamBuilder().is_compatible(verbose=False) or "Error building extension" in ranks.said()
        return
    found = exported(tmp_path / "runs" / "fit" / "latest")
    assert max(value.abs().max().item() for name, value in found.items() if "lora_B" in name) > 0


def test_a_strategy_without_its_library_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    monkeypatch.setattr("lightning.pytorch.strategies.deepspeed._DEEPSPEED_AVAILABLE", False)
    overlay = str(CONFIGS / "strategies" / "deepspeed_zero2.yaml")
    words = ["--config", str(CONFIGS / "scdpo.yaml"), "--config", overlay, "--run.root", str(tmp_path)]
    assert main(["fit", *words]) == 2
    complaints = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(complaints) == 1
    assert "you must have DeepSpeed installed" in complaints[0]
