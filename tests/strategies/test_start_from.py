"""Another strategy, another number of ranks: what is resumed, what begins again from its weights, what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn

from lit_safety.adapters.start_from import read_file
from lit_safety.core.errors import UserError
from lit_safety.modules.strategies import check_resume, lost_rank
from tests.helpers.methods import METHODS, exported, under, write_config
from tests.helpers.ranks import run, start

#: A step that moves nothing.
STILL = [
    "--model.init_args.optimizer.init_args.lr",
    "0",
    "--trainer.max_steps",
    "1",
    "--trainer.limit_val_batches",
    "0",
]


def trainer(strategy: object, path: Path, world_size: int = 2, what: TrainerFn = TrainerFn.FITTING) -> SimpleNamespace:
    state = SimpleNamespace(fn=what)
    return SimpleNamespace(strategy=strategy, ckpt_path=str(path), world_size=world_size, state=state)


def file_of(path: Path, strategy: str | None) -> Path:
    torch.save({"state_dict": {}, **({} if strategy is None else {"strategy": strategy})}, path)
    return path


def folder_of(path: Path, stage: int, ranks: int) -> Path:
    """The files by which DeepSpeed's checkpoints are distinguished."""
    (path / "checkpoint").mkdir(parents=True)
    for rank in range(ranks):
        (path / "checkpoint" / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
        if stage == 3:
            (path / "checkpoint" / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt").touch()
    return path


def test_a_checkpoint_of_another_strategy_is_refused_with_the_way_on(tmp_path: Path):
    ddp, fsdp, zero2 = DDPStrategy(), ModelParallelStrategy(), DeepSpeedStrategy(stage=2)
    plain, pieces = file_of(tmp_path / "a.ckpt", None), file_of(tmp_path / "b.ckpt", "FSDP2")
    folder, third = folder_of(tmp_path / "c.ckpt", 2, 2), folder_of(tmp_path / "d.ckpt", 3, 2)
    for strategy, path in ((ddp, plain), (fsdp, pieces), (zero2, folder), (DeepSpeedStrategy(stage=3), third)):
        check_resume(trainer(strategy, path))
    wrong = ((ddp, pieces), (ddp, folder), (fsdp, plain), (fsdp, folder), (zero2, plain), (zero2, third), (ddp, third))
    for strategy, path in wrong:
        with pytest.raises(UserError, match=r"was written under .*start_from"):
            check_resume(trainer(strategy, path))
    check_resume(trainer(ddp, pieces, what=TrainerFn.PREDICTING))  # a file has the weights whole
    with pytest.raises(UserError, match=r"2 ranks of DeepSpeed.* 4"):
        check_resume(trainer(zero2, folder, world_size=4))
    (tmp_path / "e").mkdir()
    with pytest.raises(UserError, match="checkpoint of DeepSpeed or FSDP2"):
        check_resume(trainer(zero2, tmp_path / "e"))
    (tmp_path / "f.ckpt").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(UserError, match="readable checkpoint"):
        check_resume(trainer(ddp, tmp_path / "f.ckpt"))


def test_what_gloo_says_of_a_lost_rank_is_distinguished_from_other_errors():
    """As torch 2.13 words it."""
    assert lost_rank(RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:2391"))
    assert not lost_rank(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not lost_rank(ValueError("Connection closed by peer"))


@pytest.mark.parametrize("method", ["scdpo", *(pytest.param(n, marks=pytest.mark.slow) for n in METHODS[1:])])
def test_a_run_begins_with_the_weights_of_an_export_or_a_checkpoint(
    method: str, tiny_pipeline: Path, user_shards: Path, tmp_path: Path
):
    config = write_config(tmp_path, method, tiny_pipeline, user_shards)
    command = ["fit", "--config", str(config)]
    run(command, tmp_path / "logs", ranks=1)
    first = (tmp_path / "runs" / "fit" / "latest").resolve()
    weights = exported(first)
    export = {"full": "pipeline", "dpo_expert": "experts"}.get(method, "adapter")
    begun = {}
    for source in (first / export, first / "checkpoints" / "last.ckpt"):
        more = [*STILL, "--model.init_args.start_from", str(source), "--run.name", source.name]
        begun[source.name] = start([*command, *more], tmp_path / source.name, ranks=1)
    for name, ranks in begun.items():
        assert ranks.wait() == [0], ranks.said()
        found = exported(tmp_path / "runs" / name / "latest")
        merged = "adapter/" if method == "dpo_expert" else "none"
        assert all(torch.equal(found[key], value) for key, value in weights.items() if not key.startswith(merged)), name


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed_zero2", "deepspeed_zero3"])
def test_a_run_begins_with_the_checkpoint_of_another_strategy(
    strategy: str, tiny_pipeline: Path, user_shards: Path, tmp_path: Path
):
    config = write_config(tmp_path, "scdpo", tiny_pipeline, user_shards)
    command = ["fit", "--config", str(config)]
    run([*command, *under(strategy), "--trainer.devices", "2"], tmp_path / "logs")
    first = (tmp_path / "runs" / "fit" / "latest").resolve()
    last = str(first / "checkpoints" / "last.ckpt")
    run([*command, *STILL, "--model.init_args.start_from", last], tmp_path / "logs", ranks=1)
    found = exported(tmp_path / "runs" / "fit" / "latest")
    assert all(torch.equal(found[name], value) for name, value in exported(first).items())


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_one_process_goes_on_with_what_two_began(strategy: str, tiny_pipeline: Path, user_shards: Path, tmp_path: Path):
    """Two ranks of 2 pairs, then one with 4: the same pairs, so the same weights but for the order of sums."""
    config = write_config(tmp_path, "scdpo", tiny_pipeline, user_shards)
    command = ["fit", "--config", str(config), *under(strategy)]
    run([*command, "--trainer.devices", "2"], tmp_path / "logs")
    latest = tmp_path / "runs" / "fit" / "latest"
    whole, checkpoint = exported(latest), latest.resolve() / "checkpoints" / "step=2.ckpt"
    assert read_file(checkpoint)["global_step"] == 2
    fewer = ["--trainer.devices", "1", "--data.init_args.batch_size", "4", "--ckpt_path", str(checkpoint)]
    run([*command, *fewer], tmp_path / "logs", ranks=1)
    found = exported(latest)
    moved = max(value.abs().max().item() for name, value in whole.items() if "lora_B" in name)
    assert max((found[name] - value).abs().max().item() for name, value in whole.items()) < 1e-2 * moved
