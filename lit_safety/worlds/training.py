"""Training by wall time: how much of a budget is used, including interrupted runs."""

import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from lit_safety.core.errors import UserError
from lit_safety.core.processes import deaf_to_ctrl_c, end_all


class Budget:
    """The time budget of a training. `fraction` goes from 0 to 1, and schedules are functions of it."""

    def __init__(self, minutes: float, spent: float = 0.0) -> None:
        """`spent`: seconds that earlier, interrupted runs used."""
        self.seconds = 60 * minutes
        self._start = time.monotonic() - spent

    @property
    def spent(self) -> float:
        """Seconds used so far."""
        return time.monotonic() - self._start

    @property
    def fraction(self) -> float:
        """Share of the budget that is used, at most 1."""
        return min(1.0, self.spent / self.seconds) if self.seconds > 0 else 1.0


def decayed(fraction: float, warmup: float = 0.02, hold: float = 0.3) -> float:
    """Learning-rate factor: linear warm-up, constant until `hold`, then a cosine down to 0 at fraction 1."""
    from math import cos, pi

    if fraction < warmup:
        return max(0.02, fraction / warmup)
    if fraction < hold:
        return 1.0
    return 0.5 * (1 + cos(pi * (fraction - hold) / (1 - hold)))


def check_device(name: str) -> None:
    """Refuse a device that torch does not find.

    Raises:
        UserError: names the option and the device.
    """
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        said = str(error).splitlines()[0]
        raise UserError(
            f"`--device {name}`: torch cannot use it ({said}); set cpu, or cuda on a machine with a GPU"
        ) from error


def fast_numbers(device: torch.device) -> AbstractContextManager[Any]:
    """bfloat16 for matrix products on GPUs and on CPUs with AVX-512 BF16; else float32.

    On such a CPU it is 1.45 times as fast as float32. A CPU without these instructions computes it many times more
    slowly: 12 times for a UNet on Zen 3.
    """
    has_it = device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=has_it)


# Several processes with one thread each train one network: on few, busy cores this is faster than threads.


def share_gradients(
    parameters: list[nn.Parameter], fraction: float, loss: torch.Tensor, world: int
) -> tuple[float, torch.Tensor]:
    """Averages gradients over the processes, in place; returns the averages of the budget's fraction and of the loss.

    One process alone gets back what it gave, so that it does not wait for a GPU.
    """
    if world == 1:
        return fraction, loss
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([*(gradient.reshape(-1) for gradient in gradients), torch.tensor([fraction]), loss.reshape(1)])
    torch.distributed.all_reduce(flat)
    flat /= world
    parts = flat.split([*(gradient.numel() for gradient in gradients), 1, 1])
    for gradient, part in zip(gradients, parts, strict=False):
        gradient.copy_(part.view_as(gradient))
    return float(parts[-2]), parts[-1][0]


def _join(rank: int, train: Callable[..., None], world: int, port: int, arguments: tuple[Any, ...]) -> None:
    """One of several processes. torch sends it SIGINT when the first process has ended."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    train(rank, world, *arguments)
    torch.distributed.destroy_process_group()


def launch(train: Callable[..., None], world: int, *arguments: Any) -> None:
    """Calls `train(rank, world, *arguments)` in `world` processes, or in this one if it is 1. `train`: module-level."""
    if world == 1:
        train(0, 1, *arguments)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with deaf_to_ctrl_c():  # until they have started: a process that is still importing would end with a traceback
        context = torch.multiprocessing.spawn(_join, (train, world, port, arguments), nprocs=world, join=False)
    try:
        while not context.join():
            pass
    finally:
        end_all(context.processes)
