"""Strategies: what each cannot do, which checkpoints it can read, and what DeepSpeed and FSDP2 need for a step.

Settings are refused by name, before weights are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from lit_safety.core.errors import UserError

#: The end of messages that refuse a checkpoint: another way to continue.
WARM_START = (
    "or begin a new run from its weights: `--model.init_args.start_from` with this checkpoint or an exported adapter"
)


COMPILER = (
    "install a C++ compiler, ninja, Python's headers and, for GPUs, the CUDA toolkit, or use deepspeed_zero3 without "
    "offload"
)


def family(strategy: Strategy) -> str:
    """The family of a strategy: runs of the same family can read each other's checkpoints."""
    if isinstance(strategy, DeepSpeedStrategy):
        return "DeepSpeed ZeRO 3" if strategy.zero_stage_3 else "DeepSpeed ZeRO 1 or 2"
    return "FSDP2" if isinstance(strategy, ModelParallelStrategy) else "one process or DDP"


def prepare_strategy(trainer: Trainer) -> None:
    """Refuse strategies that do not work here, let DeepSpeed compute in autocast and FSDP2 use all ranks.

    Raises:
        UserError: FSDP 1, DeepSpeed without a GPU or in float16, tensor parallelism, sizes that do not fit the number
            of ranks.
    """
    strategy: Any = trainer.strategy
    if isinstance(strategy, FSDPStrategy):
        raise UserError("`trainer.strategy` is FSDP 1: use FSDP2 with `--config configs/strategies/fsdp.yaml`")
    # A subclass may run on other devices; then it has its own cluster environment.
    own = type(strategy).setup_environment is DeepSpeedStrategy.setup_environment
    if isinstance(strategy, DeepSpeedStrategy) and own and not isinstance(trainer.accelerator, CUDAAccelerator):
        raise UserError(
            f"`trainer.strategy` is {type(strategy).__name__}, which needs CUDA GPUs, but the accelerator is "
            f"{type(trainer.accelerator).__name__}: use ddp or fsdp, or `trainer.accelerator: gpu`"
        )
    if isinstance(strategy, DeepSpeedStrategy):
        set_step(strategy)
        _check_offload(strategy)
    if isinstance(strategy, ModelParallelStrategy):
        if strategy._tensor_parallel_size != 1:
            raise UserError(
                f"`trainer.strategy.init_args.tensor_parallel_size` is {strategy._tensor_parallel_size}: networks are "
                "sharded only over data-parallel ranks, set it to 1"
            )
        if strategy._data_parallel_size == "auto":  # Lightning's own `auto` means one for each node
            strategy._data_parallel_size = trainer.world_size
        if strategy._data_parallel_size != trainer.world_size:
            raise UserError(
                f"`trainer.strategy.init_args.data_parallel_size` is {strategy._data_parallel_size} but there are "
                f"{trainer.world_size} ranks (devices x num_nodes): set it to auto"
            )


def _check_offload(strategy: Any) -> None:
    """Raises `UserError` if the optimizer must run on the CPU but DeepSpeed's CPU optimizer cannot be built."""
    zero = strategy.config.get("zero_optimization", {})
    if "offload_optimizer" not in zero or strategy.config.get("zero_force_ds_cpu_optimizer") is False:
        return
    from deepspeed.ops.op_builder import CPUAdamBuilder

    if not CPUAdamBuilder().is_compatible(verbose=False):
        raise UserError(f"ZeRO's CPU offload needs DeepSpeedCPUAdam, which cannot be built here: {COMPILER}")


def check_resume(trainer: Trainer) -> None:
    """Check that the strategy can resume the checkpoint, before any part of it is loaded.

    Raises:
        UserError: it was written under another strategy, or by another number of ranks and the strategy cannot change
            it.
    """
    given, strategy = trainer.ckpt_path, trainer.strategy
    if given is None or "://" in str(given) or not Path(given).exists():
        return
    path, mine = Path(given), family(strategy)
    if path.is_file() and trainer.state.fn != TrainerFn.FITTING and not isinstance(strategy, DeepSpeedStrategy):
        return  # only the weights are read, and the file holds them whole
    theirs = written_by(path)
    if theirs is not None and theirs != mine:
        raise UserError(
            f"`--ckpt_path {path}` was written under {theirs}, but this run's strategy is {mine}: resume with that "
            f"one, {WARM_START}"
        )
    if isinstance(strategy, DeepSpeedStrategy) and (ranks := ranks_of(path)) and ranks != trainer.world_size:
        raise UserError(
            f"`--ckpt_path {path}` was written by {ranks} ranks of DeepSpeed, but this run has {trainer.world_size}: "
            f"resume with {ranks}, {WARM_START}"
        )


def written_by(path: Path) -> str | None:
    """The family of the strategy that wrote a checkpoint; None if the checkpoint does not say it."""
    if path.is_dir():
        if (path / ".metadata").is_file():
            return "FSDP2"
        if not (path / "checkpoint").is_dir():
            raise UserError(f"`--ckpt_path {path}` is a folder, but not a checkpoint of DeepSpeed or FSDP2")
        # Only ZeRO 3 shards the network itself.
        sharded = any((path / "checkpoint").glob("*zero_pp_rank_*_model_states.pt"))
        return "DeepSpeed ZeRO 3" if sharded else "DeepSpeed ZeRO 1 or 2"
    from lit_safety.adapters.start_from import read_file

    return str(read_file(path).get("strategy", "one process or DDP"))


def ranks_of(path: Path) -> int:
    """The number of ranks that wrote a checkpoint of DeepSpeed."""
    return len(list((path / "checkpoint").glob("*zero_pp_rank_*_optim_states.pt")))


def lost_rank(error: BaseException) -> bool:
    """Whether an error comes from a collective operation because another rank has ended or does not answer."""
    if isinstance(error, torch.distributed.DistError):
        return True
    words = ("Connection closed by peer", "Connection reset by peer", "[gloo", "Timed out waiting")
    return isinstance(error, RuntimeError) and any(one in str(error) for one in words)


def cannot_offload(error: BaseException) -> str | None:
    """The message for an error with which DeepSpeed refuses to step on the CPU; None for other errors."""
    said = str(error).strip().splitlines() or [""]
    if type(error).__name__ == "ZeRORuntimeException":
        return f"{said[0]}; `configs/strategies/deepspeed_zero3_offload.yaml` sets DeepSpeedCPUAdam"
    if isinstance(error, RuntimeError) and "Error building extension" in said[0]:
        return f"DeepSpeed cannot compile what the strategy needs ({said[0]}): {COMPILER}"
    return None


def check_weights(trained: Mapping[str, Tensor], held: Mapping[str, Tensor], where: str) -> None:
    """Compare names and shapes of the trained weights with those from ``where``.

    Raises:
        UserError: they differ; the message names the first.
    """
    mine = {name: tuple(parameter.shape) for name, parameter in trained.items()}
    theirs = {name: tuple(value.shape) for name, value in held.items()}
    differing = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
    if differing:
        raise UserError(
            f"{where}'s weights do not fit what is trained here: {len(differing)} differ (first: {differing[0]}); it "
            "was written by a run with another model, rank or target_modules: use the config.yaml of that run"
        )


# A step under DeepSpeed that computes the same as under every other strategy.
#
# Lightning's own plugin does not. Under bf16-mixed it rounds all weights and every number of a batch to bfloat16, also
# latents, costs and the errors of a cached reference. And fp32 latents of images meet half-precision weights, which
# convolutions do not accept. With k accumulated batches each loss is divided by k twice, by Lightning's loop and by
# DeepSpeed's engine, so that gradients are k times too small. Adam hides this, but gradient clipping, Adam's epsilon
# and SGD do not.


class DeepSpeedStep(DeepSpeedPrecision):
    """Divides a loss only once, by Lightning, and does not convert batches if DeepSpeed computes in autocast.

    Args:
        precision: the trainer's precision.
        autocast: whether DeepSpeed's engine computes in autocast (`torch_autocast` of its configuration).
    """

    def __init__(self, precision: Any, autocast: bool) -> None:
        super().__init__(precision)
        self.autocast = autocast

    def convert_input(self, data: Any) -> Any:
        return data if self.autocast else super().convert_input(data)

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        # DeepSpeed's autocast keeps casts of trained weights. The pass with gradient would find a cast from a pass
        # without gradient, such as selective backward's first, and the weights would get no gradient.
        kept = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            with super().forward_context():
                yield
        finally:
            torch.set_autocast_cache_enabled(kept)

    def backward(self, tensor: Tensor, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        super().backward(tensor, model, optimizer, *args, scale_wrt_gas=False, **kwargs)


def set_step(strategy: Any) -> None:
    """Give this step to ``strategy``, a `DeepSpeedStrategy` that has not begun.

    A user's DeepSpeed configuration that sets `bf16` keeps its precision, and a user's own plugin is not changed.

    Raises:
        UserError: the precision is 16-mixed, for which DeepSpeed would store weights in float16.
    """
    plugin = strategy.precision_plugin
    if plugin.precision == "16-mixed":
        raise UserError(
            "`trainer.precision: 16-mixed` under DeepSpeed would round all weights to float16: set it to bf16-mixed or "
            "32-true, or use `--config configs/strategies/ddp.yaml`"
        )
    if type(plugin) is not DeepSpeedPrecision:
        return
    autocast = plugin.precision == "bf16-mixed" and "bf16" not in strategy.config
    strategy.precision_plugin = DeepSpeedStep(plugin.precision, autocast)
    if autocast:
        strategy.config["bf16"] = {"enabled": False}
        # An empty list: no module's gradients are sent in bfloat16.
        settings = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        strategy.config.setdefault("torch_autocast", settings)


# FSDP2: the network is sharded over all ranks, and each block is gathered while it computes.
#
# Trained and frozen weights are sharded in the same way, block by block. A LoRA's weights, gradients and moments are
# small, so most memory is in the frozen base, and sharding the base is why people use FSDP. One gather then brings a
# block's base and its adapter together.


def under_fsdp(trainer: Trainer | None) -> bool:
    return trainer is not None and isinstance(trainer.strategy, ModelParallelStrategy)


def weights_are_sharded(trainer: Trainer) -> bool:
    """Whether the network's weights are sharded over all ranks, so that all ranks must take part in drawing."""
    strategy = trainer.strategy
    return isinstance(strategy, FSDPStrategy | ModelParallelStrategy) or bool(getattr(strategy, "zero_stage_3", False))


def shard(network: nn.Module, mesh: Any) -> None:
    """Shard ``network``: each block as its own group, then the remaining weights.

    Args:
        network: a whole denoiser; afterwards its parameters are different objects.
        mesh: one-dimensional `DeviceMesh` of the ranks that hold the shards.
    """
    anything: Any = network
    anything.to(memory_format=torch.contiguous_format)  # FSDP2 can shard only contiguous weights
    for block in blocks(network):
        fully_shard(block, mesh=mesh)
    from lit_safety.adapters.user_attention import PROJECTION

    outside = getattr(network, PROJECTION, None)
    if outside is not None:
        fully_shard(outside, mesh=mesh)
    # The root is sharded again after a forward pass too, so that between steps every weight is the optimizer's.
    fully_shard(network, mesh=mesh, reshard_after_forward=True)
    if outside is not None:
        _root_first(network, outside)


def blocks(network: nn.Module) -> list[nn.Module]:
    """The parts of a diffusers network that must stay together on a device, inner parts first."""
    names = {*(getattr(network, "_no_split_modules", None) or ()), *(getattr(network, "_repeated_blocks", None) or ())}
    found = [module for module in network.modules() if type(module).__name__ in names and module is not network]
    return found[::-1]


def _root_first(network: nn.Module, outside: nn.Module) -> None:
    """Make ``network`` FSDP2's root although its part ``outside`` is called first.

    FSDP2 takes as the root the module that computes first.
    """
    anything: Any = network
    anything.begin_forward = lambda: None
    register_fsdp_forward_method(network, "begin_forward")

    def begin(module: nn.Module, arguments: Any) -> None:
        handle.remove()
        anything.begin_forward()

    handle = outside.register_forward_pre_hook(begin, prepend=True)


def as_on_rank_0(parameters: Iterable[nn.Parameter], device: torch.device) -> None:
    """Give every rank the values of rank 0, as DDP does: a rank that drew more random numbers would have others."""
    for parameter in parameters:
        values = parameter.data.to(device).contiguous()
        torch.distributed.broadcast(values, src=0)
        parameter.data.copy_(values)


def drop_frozen(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """A hook on `state_dict` that removes frozen weights, so that they are not gathered."""
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            state.pop(prefix + name, None)
