"""What a strategy cannot do, and which checkpoints it can read: said by name, before weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lit_safety.adapters.start_from import read_file
from lit_safety.errors import UserError
from lit_safety.modules.deepspeed_step import set_step

#: How else a run goes on: ready to be put behind what was refused.
WARM_START = (
    "or begin a new run from its weights: `--model.init_args.start_from` with this checkpoint or an exported adapter"
)


COMPILER = (
    "install a C++ compiler, ninja, Python's headers and, for GPUs, the CUDA toolkit, or use deepspeed_zero3 without "
    "offload"
)


def family(strategy: Strategy) -> str:
    """By whose rules a strategy writes checkpoints; runs of one family can read each other's."""
    if isinstance(strategy, DeepSpeedStrategy):
        return "DeepSpeed ZeRO 3" if strategy.zero_stage_3 else "DeepSpeed ZeRO 1 or 2"
    return "FSDP2" if isinstance(strategy, ModelParallelStrategy) else "one process or DDP"


def prepare_strategy(trainer: Trainer) -> None:
    """Refuse what no run here can be trained with, let DeepSpeed compute in autocast and FSDP2 span all ranks.

    Raises:
        UserError: FSDP 1, DeepSpeed without a GPU or in float16, tensor parallelism, sizes that do not fit the ranks.
    """
    strategy: Any = trainer.strategy
    if isinstance(strategy, FSDPStrategy):
        raise UserError("`trainer.strategy` is FSDP 1: use FSDP2 by `--config configs/strategies/fsdp.yaml`")
    # A subclass may run elsewhere and says so by an environment of its own.
    own = type(strategy).setup_environment is DeepSpeedStrategy.setup_environment
    if isinstance(strategy, DeepSpeedStrategy) and own and not isinstance(trainer.accelerator, CUDAAccelerator):
        raise UserError(
            f"`trainer.strategy` is {type(strategy).__name__}, which needs CUDA GPUs, and the accelerator is "
            f"{type(trainer.accelerator).__name__}: use ddp or fsdp, or `trainer.accelerator: gpu`"
        )
    if isinstance(strategy, DeepSpeedStrategy):
        set_step(strategy)
        _check_offload(strategy)
    if isinstance(strategy, ModelParallelStrategy):
        if strategy._tensor_parallel_size != 1:
            raise UserError(
                f"`trainer.strategy.init_args.tensor_parallel_size` is {strategy._tensor_parallel_size}: networks are "
                "cut over data-parallel ranks only, set it to 1"
            )
        if strategy._data_parallel_size == "auto":  # Lightning's own auto is one a node
            strategy._data_parallel_size = trainer.world_size
        if strategy._data_parallel_size != trainer.world_size:
            raise UserError(
                f"`trainer.strategy.init_args.data_parallel_size` is {strategy._data_parallel_size} and there are "
                f"{trainer.world_size} ranks (devices x num_nodes): set it to auto"
            )


def _check_offload(strategy: Any) -> None:
    """Raises `UserError` where the optimizer is to run on the CPU and DeepSpeed's cannot be built there."""
    zero = strategy.config.get("zero_optimization", {})
    if "offload_optimizer" not in zero or strategy.config.get("zero_force_ds_cpu_optimizer") is False:
        return
    from deepspeed.ops.op_builder import CPUAdamBuilder

    if not CPUAdamBuilder().is_compatible(verbose=False):
        raise UserError(f"ZeRO's CPU offload steps with DeepSpeedCPUAdam, which cannot be built here: {COMPILER}")


def check_resume(trainer: Trainer) -> None:
    """Compare the checkpoint that is resumed with the strategy, before anything of it is loaded.

    Raises:
        UserError: it was written under another strategy, or by another number of ranks where that cannot be changed.
    """
    given, strategy = trainer.ckpt_path, trainer.strategy
    if given is None or "://" in str(given) or not Path(given).exists():
        return
    path, mine = Path(given), family(strategy)
    if path.is_file() and trainer.state.fn != TrainerFn.FITTING and not isinstance(strategy, DeepSpeedStrategy):
        return  # only the weights are read, and a file has them whole
    theirs = written_by(path)
    if theirs is not None and theirs != mine:
        raise UserError(
            f"`--ckpt_path {path}` was written under {theirs}, and this run's strategy is {mine}: resume with "
            f"that one, {WARM_START}"
        )
    if isinstance(strategy, DeepSpeedStrategy) and (ranks := ranks_of(path)) and ranks != trainer.world_size:
        raise UserError(
            f"`--ckpt_path {path}` was written by {ranks} ranks of DeepSpeed, and here are {trainer.world_size}: "
            f"resume with {ranks}, {WARM_START}"
        )


def written_by(path: Path) -> str | None:
    """The family that wrote a checkpoint; None where it does not tell."""
    if path.is_dir():
        if (path / ".metadata").is_file():
            return "FSDP2"
        if not (path / "checkpoint").is_dir():
            raise UserError(f"`--ckpt_path {path}` is a folder, but no checkpoint of DeepSpeed or FSDP2")
        # Only ZeRO 3 has the network itself in pieces.
        in_pieces = any((path / "checkpoint").glob("*zero_pp_rank_*_model_states.pt"))
        return "DeepSpeed ZeRO 3" if in_pieces else "DeepSpeed ZeRO 1 or 2"
    return str(read_file(path).get("strategy", "one process or DDP"))


def ranks_of(path: Path) -> int:
    """By how many ranks a checkpoint of DeepSpeed was written."""
    return len(list((path / "checkpoint").glob("*zero_pp_rank_*_optim_states.pt")))


def lost_rank(error: BaseException) -> bool:
    """Whether an error is a collective's, because another rank is gone or does not answer."""
    if isinstance(error, torch.distributed.DistError):
        return True
    words = ("Connection closed by peer", "Connection reset by peer", "[gloo", "Timed out waiting")
    return isinstance(error, RuntimeError) and any(one in str(error) for one in words)


def cannot_offload(error: BaseException) -> str | None:
    """What to say of an error by which DeepSpeed refuses to step on the CPU; None for other errors."""
    said = str(error).strip().splitlines() or [""]
    if type(error).__name__ == "ZeRORuntimeException":
        return f"{said[0]}; `configs/strategies/deepspeed_zero3_offload.yaml` sets DeepSpeedCPUAdam"
    if isinstance(error, RuntimeError) and "Error building extension" in said[0]:
        return f"DeepSpeed cannot compile what the strategy needs ({said[0]}): {COMPILER}"
    return None


def check_weights(trained: Mapping[str, Tensor], held: Mapping[str, Tensor], where: str) -> None:
    """Compare names and shapes of what is trained with what ``where`` holds.

    Raises:
        UserError: they differ; names the first.
    """
    mine = {name: tuple(parameter.shape) for name, parameter in trained.items()}
    theirs = {name: tuple(value.shape) for name, value in held.items()}
    differing = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
    if differing:
        raise UserError(
            f"{where}'s weights are not those trained here: {len(differing)} differ (first: {differing[0]}); it was "
            "written by a run with another model, rank or target_modules: use that run's config.yaml"
        )
