"""SC-DPO: preference optimisation whose margin and focus follow the safety cost of the two images."""

from __future__ import annotations

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

from lit_safety.adapters.lora import LoRA
from lit_safety.modules.preference import Drawing, PreferenceModule
from lit_safety.objectives import Objective, SafetyConstrainedDPO


class SCDPO(PreferenceModule):
    """SC-DPO, as reconstructed from the abstract of arXiv 2504.14290 (see `objectives/safety_constrained.py`).

    Costs come with the pairs (`cost` in a shard's metadata).

    Args:
        pretrained: the model to align: a diffusers pipeline folder or a hub id.
        objective: the loss on a batch of pairs; SC-DPO's own by default.
        lora: the adapter that is trained.
        optimizer: made from the trainable parameters.
        lr_scheduler: made from the optimizer, stepped once an optimizer step; null: constant learning rate.
        prompt_dropout: probability with which a pair is trained on the empty prompt, in [0, 1).
        timestep_bins: into how many equal bins of the noise schedule validation errors are sorted.
        drawing: how pictures are drawn at validation and by `predict`.
    """

    def __init__(
        self,
        pretrained: str,
        objective: Objective | None = None,
        lora: LoRA | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        prompt_dropout: float = 0.0,
        timestep_bins: int = 4,
        drawing: Drawing | None = None,
    ) -> None:
        super().__init__(
            pretrained,
            objective or SafetyConstrainedDPO(),
            lora,
            optimizer,
            lr_scheduler,
            prompt_dropout,
            timestep_bins,
            drawing,
        )
