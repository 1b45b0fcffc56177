"""Strategies that Lightning offers on GPUs only, made to run on CPUs over gloo so that they are tested for real.

YAML and command lines name them by class path, `tests.helpers.strategies_cpu.DeepSpeedCPU`.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy


class DeepSpeedCPU(DeepSpeedStrategy):
    """DeepSpeed without Lightning's check for CUDA; ZeRO 1, 2 and 3 themselves run on CPUs.

    Args:
        stage: of ZeRO.
        exclude_frozen_parameters: from checkpoints.
        overlap_comm: streams are for GPUs.
        reduce_bucket_size: numbers in a buffer.
        allgather_bucket_size: the same.
        settings: Lightning's.
    """

    def __init__(
        self,
        stage: int = 2,
        exclude_frozen_parameters: bool = True,
        overlap_comm: bool = False,
        reduce_bucket_size: int = 1_000_000,
        allgather_bucket_size: int = 1_000_000,
        **settings: Any,
    ) -> None:
        super().__init__(
            stage=stage,
            process_group_backend="gloo",
            exclude_frozen_parameters=exclude_frozen_parameters,
            overlap_comm=overlap_comm,
            reduce_bucket_size=reduce_bucket_size,
            allgather_bucket_size=allgather_bucket_size,
            **settings,
        )

    def setup_environment(self) -> None:
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        import deepspeed

        # A faster all-reduce in shared memory, which would be compiled first.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)
