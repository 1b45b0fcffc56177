"""Strategies: what one cannot do, which checkpoints it can read, and what DeepSpeed and FSDP2 need for a step.

What is refused is said by name, before weights are read.
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

#: Other ways to go on, for the end of a message that refuses something.
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
        # Only ZeRO 3 shards the network itself.
        sharded = any((path / "checkpoint").glob("*zero_pp_rank_*_model_states.pt"))
        return "DeepSpeed ZeRO 3" if sharded else "DeepSpeed ZeRO 1 or 2"
    from lit_safety.adapters.start_from import read_file

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


# A step under DeepSpeed that computes what it does under every other strategy.
#
# Lightning's own plugin does not. Under bf16-mixed it rounds all weights and every number of a batch to bfloat16:
# latents, costs and a cached reference's errors too; and images' fp32 latents meet half-precision weights, which no
# convolution takes. And of k accumulated batches each loss is divided by k twice, by Lightning's loop and by the engine
# of DeepSpeed: gradients are k times too small, which Adam hides, but not gradient clipping, Adam's epsilon or SGD.


class DeepSpeedStep(DeepSpeedPrecision):
    """Leaves a loss that Lightning has divided undivided by DeepSpeed, and batches as they are in autocast.

    Args:
        precision: of the trainer.
        autocast: whether DeepSpeed's engine computes in autocast, by `torch_autocast` of its configuration.
    """

    def __init__(self, precision: Any, autocast: bool) -> None:
        super().__init__(precision)
        self.autocast = autocast

    def convert_input(self, data: Any) -> Any:
        return data if self.autocast else super().convert_input(data)

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        # DeepSpeed's autocast keeps casts of trained weights. One made in a pass without gradient, such as selective
        # backward's first, would be found by the pass with gradient, and the weights would get none.
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
    """Give ``strategy``, a `DeepSpeedStrategy` that has not begun, this step; a DeepSpeed configuration of the user's
    that says `bf16` itself keeps its precision, and a plugin of the user's is left alone.

    Raises:
        UserError: 16-mixed, which DeepSpeed knows only as weights in float16.
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
        # No module is named whose gradients would be sent in bfloat16.
        settings = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        strategy.config.setdefault("torch_autocast", settings)


# FSDP2: a network sharded over all ranks, each block gathered while it computes.
#
# What is trained and what is frozen is cut alike, block by block: a LoRA's own weights, gradients and moments are
# small, so the memory is in the frozen base, and who needs FSDP needs that cut. One gather then brings a block's base
# and its adapter together.


def under_fsdp(trainer: Trainer | None) -> bool:
    return trainer is not None and isinstance(trainer.strategy, ModelParallelStrategy)


def weights_are_sharded(trainer: Trainer) -> bool:
    """Whether the network's weights are sharded over all ranks, so that all must take part when one draws."""
    strategy = trainer.strategy
    return isinstance(strategy, FSDPStrategy | ModelParallelStrategy) or bool(getattr(strategy, "zero_stage_3", False))


def shard(network: nn.Module, mesh: Any) -> None:
    """Shard ``network``: its blocks, each a group of its own, then what is left.

    Args:
        network: a denoiser, whole; its parameters are other objects afterwards.
        mesh: one-dimensional `DeviceMesh` of the ranks that hold the shards.
    """
    anything: Any = network
    anything.to(memory_format=torch.contiguous_format)  # FSDP2 cuts contiguous weights only
    for block in blocks(network):
        fully_shard(block, mesh=mesh)
    from lit_safety.adapters.user_attention import PROJECTION

    outside = getattr(network, PROJECTION, None)
    if outside is not None:
        fully_shard(outside, mesh=mesh)
    # Not even the root stays whole after a forward pass: between steps every weight is what the optimizer has.
    fully_shard(network, mesh=mesh, reshard_after_forward=True)
    if outside is not None:
        _root_first(network, outside)


def blocks(network: nn.Module) -> list[nn.Module]:
    """The parts of a diffusers network that belong together on a device, the inner ones first."""
    names = {*(getattr(network, "_no_split_modules", None) or ()), *(getattr(network, "_repeated_blocks", None) or ())}
    found = [module for module in network.modules() if type(module).__name__ in names and module is not network]
    return found[::-1]


def _root_first(network: nn.Module, outside: nn.Module) -> None:
    """See to it that ``network`` is the root although ``outside``, a part of it, is called before it.

    FSDP2 takes for the root what computes first.
    """
    anything: Any = network
    anything.begin_forward = lambda: None
    register_fsdp_forward_method(network, "begin_forward")

    def begin(module: nn.Module, arguments: Any) -> None:
        handle.remove()
        anything.begin_forward()

    handle = outside.register_forward_pre_hook(begin, prepend=True)


def as_on_rank_0(parameters: Iterable[nn.Parameter], device: torch.device) -> None:
    """Give every rank rank 0's values, as DDP does: one that has drawn more random numbers would differ."""
    for parameter in parameters:
        values = parameter.data.to(device).contiguous()
        torch.distributed.broadcast(values, src=0)
        parameter.data.copy_(values)


def drop_frozen(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """A hook on `state_dict`: it takes frozen weights out, so that they are not gathered."""
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            state.pop(prefix + name, None)
